"""The kernels of a GPU against the reference, with plain torch for what only a GPU can run."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AttentionBatch
from sharelora_serve.kernels.paged_attention import (
    PAGE_SIZE,
    PagedRows,
    flash_attention,
    gathered_attention,
)
from sharelora_serve.kernels.reference import ReferenceKernels
from sharelora_serve.models.graphs import batch_sizes
from tests.cuda.recorded import record
from tests.cuda.steps import MAX_RUNNING, draw_script, draw_world, run_script, twin_kernels
from tests.kernels.batches import attention_batch, draw_block_tables
from tests.tiny_models import ARCHITECTURES

CPU = torch.device("cpu")
TOLERANCE = 2e-4
"""Of logits of standard deviation 2.5, both in float32: what the golden tests allow."""


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for step, (some, right) in enumerate(zip(found, expected, strict=True)):
        error = float((some - right).abs().max())
        assert error < TOLERANCE, f"step {step} of {len(right)} sequences: off by {error:.1e}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_and_decodes_give_the_references_logits_recorded_or_not(
    architecture: str, seed: int, tmp_path: Path
) -> None:
    world = draw_world(tmp_path, architecture, torch.float32, seed)
    script = draw_script(seed, num_decodes=6)
    kernels = ReferenceKernels()
    reference = world.runner(kernels, device=CPU)
    expected = run_script(world, reference, kernels.block_size, script, seed)
    twin = twin_kernels(torch.float32)
    assert_close(
        run_script(world, world.runner(twin, device=CPU), PAGE_SIZE, script, seed), expected
    )
    recorded = world.runner(twin, record=record, device=CPU)
    assert_close(run_script(world, recorded, PAGE_SIZE, script, seed), expected)
