"""What a server computes on, in which type, and with which kernels."""

import logging
import platform

import llvmlite.binding as llvm
import torch

from sharelora_serve.config import ServeConfig
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.kernels.cpu import CpuKernels, multiplies_bfloat16
from sharelora_serve.kernels.cuda import CudaKernels
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.kernels.paged_attention import flash_attention, gathered_attention
from sharelora_serve.kernels.reference import ReferenceKernels
from sharelora_serve.models.config import ModelConfig
from sharelora_serve.models.graphs import DecodeGraphs, cuda_graph

logger = logging.getLogger(__name__)

# What FlashAttention 2 computes with: Ampere or newer, and heads of these sizes.
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_DIM, _FLASH_HEAD_DIM_STEP = 256, 8

# So that a step with prompts beside streams takes at most some four times as long as one without.
_CPU_PREFILL_CHUNK, _CPU_PREFILL_PER_DECODE = 20, 2

# With a stream's own row as many as a step takes hardly longer for, where the processor multiplies
# bfloat16 and where it does not: `python -m loadtest step --streams 4` tells.
_CPU_BFLOAT16_SPECULATIVE_TOKENS, _CPU_SPECULATIVE_TOKENS = 7, 3


def choose_device(config: ServeConfig) -> torch.device:
    """The CPU, or the current CUDA device; ConfigurationError where one is asked for in vain."""
    has_cuda = torch.cuda.is_available()
    asked = [
        s
        for s, value in (("device", config.device), ("kernels", config.kernels))
        if value == "cuda"
    ]
    if asked and not has_cuda:
        raise ConfigurationError(
            f"{asked[0]} = cuda: torch finds no CUDA device here; use --device cpu, or install a "
            "CUDA build of torch and a driver"
        )
    wants_cuda = bool(asked) or (config.device == "auto" and config.kernels != "cpu")
    if has_cuda and wants_cuda:
        return torch.device("cuda", torch.cuda.current_device())  # whatever other threads have
    return torch.device("cpu")


def choose_dtype(config: ServeConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """Of base weights, KV cache and, unless --adapter-dtype says otherwise, adapters."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    if device.type == "cuda" or (model.dtype == torch.bfloat16 and multiplies_bfloat16()):
        return model.dtype
    if _converts_float16():
        return torch.float16
    logger.warning("this processor cannot convert float16: using float32, at twice the memory")
    return torch.float32


def choose_prefill_chunk(config: ServeConfig, device: torch.device) -> tuple[int, int]:
    """Most prompt tokens beside requests that decode: of a step, and for each of them if more.

    On a CPU every token makes the step longer.
    """
    if config.prefill_chunk is not None:
        return config.prefill_chunk, 0
    if device.type == "cpu":
        return min(_CPU_PREFILL_CHUNK, config.max_batch_tokens), _CPU_PREFILL_PER_DECODE
    return config.max_batch_tokens, 0


def choose_speculative_rows(config: ServeConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Of a step that has drafts, the most."""
    num_drafts = config.speculative_tokens
    if num_drafts is None:
        num_drafts = 0
        if device.type == "cpu":
            is_fast = dtype == torch.bfloat16 and multiplies_bfloat16()
            num_drafts = _CPU_BFLOAT16_SPECULATIVE_TOKENS if is_fast else _CPU_SPECULATIVE_TOKENS
    return min(1 + num_drafts, config.max_batch_tokens)


def choose_kernels(
    config: ServeConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Kernels:
    """The fastest that the device has, or those that were asked for."""
    if config.kernels == "reference":
        return ReferenceKernels()
    if device.type == "cpu":
        return CpuKernels()
    # Only here: nothing but a CUDA build of torch brings Triton along.
    from sharelora_serve.kernels.triton_adapted import add_adapters

    has_flash = (
        dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
        and model.head_dim <= _FLASH_HEAD_DIM
        and model.head_dim % _FLASH_HEAD_DIM_STEP == 0
    )
    if not has_flash:
        logger.warning(
            "attention runs in plain torch, slowly: the fast one needs float16 or bfloat16, "
            "compute capability 8.0 or newer, and heads of at most 256 numbers, a multiple of 8"
        )
    return CudaKernels(dtype, flash_attention if has_flash else gathered_attention, add_adapters)


def choose_graphs(
    kernels: Kernels, device: torch.device, max_running: int, max_model_len: int
) -> DecodeGraphs | None:
    """What records decode steps, where the device can and the kernels fit into it."""
    if device.type != "cuda" or not isinstance(kernels, CudaKernels):
        return None
    return DecodeGraphs(
        cuda_graph(device),
        max_running=max_running,
        max_blocks=-(-max_model_len // kernels.block_size),
        device=device,
    )


def _converts_float16() -> bool:
    """Whether the processor turns float16 into float32 in one instruction."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # every 64-bit Arm does
    return bool(llvm.get_host_cpu_features().get("f16c"))
