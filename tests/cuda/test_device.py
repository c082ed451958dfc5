"""What is chosen to compute on, and what is said where it is not there."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sharelora_serve.config import ServeConfig
from sharelora_serve.engine import device
from sharelora_serve.engine.device import (
    choose_device,
    choose_dtype,
    choose_graphs,
    choose_prefill_chunk,
    choose_speculative_rows,
)
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.kernels.reference import ReferenceKernels
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.graphs import batch_sizes
from sharelora_serve.models.source import base_folder


@pytest.mark.parametrize("settings", [{"device": "cuda"}, {"kernels": "cuda"}])
def test_a_gpu_that_is_not_there_is_missed_by_name(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="finds no CUDA device") as caught:
        choose_device(ServeConfig(**settings))
    assert caught.value.message.startswith(f"{next(iter(settings))} = cuda")


def test_auto_takes_the_gpu_unless_kernels_of_a_processor_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device(ServeConfig()) == torch.device("cuda", 1)
    assert choose_device(ServeConfig(kernels="reference")) == torch.device("cuda", 1)
    assert choose_device(ServeConfig(kernels="cpu")) == torch.device("cpu")
    assert choose_device(ServeConfig(device="cpu")) == torch.device("cpu")


def test_auto_takes_a_checkpoints_own_bfloat16_where_it_is_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    float32 = load_model_config(base_folder(None))
    own = replace(float32, dtype=torch.bfloat16)
    for multiplies, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(device, "multiplies_bfloat16", lambda does=multiplies: does)
        monkeypatch.setattr(device, "_converts_float16", lambda: True)
        assert choose_dtype(ServeConfig(), own, torch.device("cpu")) == expected
        assert choose_dtype(ServeConfig(), float32, torch.device("cpu")) == torch.float16
        asked = ServeConfig(dtype="float32")
        assert choose_dtype(asked, own, torch.device("cpu")) == torch.float32


def test_kernels_of_a_gpu_on_a_processor_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="kernels = 'cuda'"):
        ServeConfig(kernels="cuda", device="cpu")


def test_prompts_beside_streams_are_cut_for_a_processor_alone() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert choose_prefill_chunk(ServeConfig(), gpu) == (512, 0)
    assert choose_prefill_chunk(ServeConfig(), cpu) == (20, 2)
    assert choose_prefill_chunk(ServeConfig(prefill_chunk=7), cpu) == (7, 0)
    small = ServeConfig(max_running=8, max_batch_tokens=16)
    assert choose_prefill_chunk(small, cpu) == (16, 2)


@pytest.mark.parametrize("multiplies", [True, False])
def test_as_much_is_guessed_ahead_as_costs_the_device_little(
    monkeypatch: pytest.MonkeyPatch, multiplies: bool
) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: multiplies)

    def rows(config: ServeConfig, dtype: torch.dtype = torch.bfloat16) -> int:
        return choose_speculative_rows(config, dtype, cpu)

    assert choose_speculative_rows(ServeConfig(), torch.bfloat16, gpu) == 1
    assert rows(ServeConfig()) == (8 if multiplies else 4)
    assert rows(ServeConfig(), torch.float16) == 4
    assert rows(ServeConfig(speculative_tokens=5)) == 6
    assert rows(ServeConfig(speculative_tokens=0)) == 1
    assert rows(ServeConfig(max_running=2, max_batch_tokens=2)) == 2


def test_nothing_is_recorded_but_kernels_of_a_gpu() -> None:
    assert choose_graphs(ReferenceKernels(), torch.device("cuda", 0), 8, 512) is None


def test_recorded_sizes_are_powers_of_two_up_to_the_largest_batch() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(8) == [1, 2, 4, 8]
