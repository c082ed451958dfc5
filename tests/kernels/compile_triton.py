"""Compiles the GPU's adapter kernels with no GPU at hand; prints what each needs, as JSON.

A process of its own: in the tests' Triton interprets.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sharelora_serve.kernels.triton_adapted import choose_launch
from sharelora_serve.kernels.triton_kernels import expand_kernel, shrink_kernel

CAPABILITIES = (80, 90)
NUM_TOKENS = (32, 512, 2048)  # each is cut into programs in a way of its own
IN_FEATURES = (4096, 576, 1536, 11008)
MAX_PAGES = (2, 8)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FACTORS = DTYPES | {torch.int8: "i8"}

INTEGER_POINTERS = {"row_adapter", "offsets", "a_pages", "b_pages"}
ALIGNED = {"x_stride", "out_stride", "in_features", "max_rank", "slice_size"}  # to 16 elements
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}


def variants() -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    """Kernels, what they are compiled with, and their floating-point pointers; each once."""
    seen = set()
    pairs = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.int8)]
    for dtype, factors in pairs:
        sizes = product(NUM_TOKENS, IN_FEATURES) if dtype == torch.bfloat16 else [(32, 4096)]
        for num_tokens, in_features in sizes:
            for max_pages in MAX_PAGES:
                launch = choose_launch(num_tokens, in_features, max_pages, dtype, factors)
                name = DTYPES[dtype]
                pointers = {"x": name, "out": name, "arena": FACTORS[factors]}
                for kernel, constants in (
                    (shrink_kernel, launch.shrink),
                    (expand_kernel, launch.expand),
                ):
                    key = kernel.__name__, *pointers.values(), repr(constants)
                    if key not in seen:
                        seen.add(key)
                        yield kernel, constants | {"NUM_MODULES": 3}, pointers


def compiled(
    kernel: Any, constants: dict[str, Any], pointers: dict[str, str], capability: int
) -> Any:
    options = {name: constants[name] for name in OPTIONS & constants.keys()}
    constants = {name: constants[name] for name in constants.keys() - OPTIONS}
    signature: dict[str, Any] = {}
    attributes = {}
    aligned = [["tt.divisibility", 16]]
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "columns":
            signature[name] = ("i32",) * 4
            attributes |= {(place, i): aligned for i in range(4)}
        elif name in INTEGER_POINTERS:
            signature[name], attributes[place,] = "*i32", aligned
        elif name in {"hidden", "scaling", *pointers}:
            signature[name], attributes[place,] = f"*{pointers.get(name, 'fp32')}", aligned
        else:
            signature[name] = "i32"
            if name in ALIGNED:
                attributes[place,] = aligned
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def needs(result: Any) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, where what is spilled goes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    wide = "cp.async.cg" in result.asm["ptx"] or "ld.global.v4" in result.asm["ptx"]
    return used | {"shared": result.metadata.shared, "wide": wide}


def main() -> None:
    """One line for each variant and capability."""
    for kernel, constants, pointers in variants():
        for capability in CAPABILITIES:
            report = needs(compiled(kernel, constants, pointers, capability))
            name = f"{kernel.__name__} {pointers['arena']} {constants} sm_{capability}"
            print(json.dumps({"name": name, **report}))  # noqa: T201


if __name__ == "__main__":
    main()
