"""The kernels of a GPU against the reference, with plain torch for what only a GPU can run."""

from pathlib import Path

import pytest
import torch

from sharelora_serve.kernels.reference import ReferenceKernels
from tests.cuda.recorded import record
from tests.cuda.steps import draw_script, draw_world, run_script, twin_kernels
from tests.golden.reference import TOLERANCE
from tests.tiny_models import ARCHITECTURES

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_and_recorded_decodes_give_the_logits_of_the_reference(
    architecture: str, seed: int, tmp_path: Path
) -> None:
    world = draw_world(tmp_path, architecture, torch.float32, seed)
    script = draw_script(seed, num_decodes=6)
    reference, twin = ReferenceKernels(), twin_kernels(torch.float32)
    answers = [
        run_script(world, runner, kernels.block_size, script, seed)
        for kernels, runner in (
            (reference, world.runner(reference, device=CPU)),
            (twin, world.runner(twin, record=record, device=CPU)),
        )
    ]
    for step, (expected, found) in enumerate(zip(*answers, strict=True)):
        error = float((found - expected).abs().max())
        assert error < TOLERANCE, f"step {step} of {len(expected)} sequences: off by {error:.1e}"
