"""The state of a run on disk: what is needed to go on and end with the same weights."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sharelora_serve.errors import ConfigurationError
from sharelora_serve.training.factors import Factors

FILE = "checkpoint.safetensors"

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of every trained factor


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The losses of a step, and after it."""

    step: int
    loss: float
    validation_loss: float | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a run has come.

    num_steps   steps that were taken
    num_tokens  tokens in them, padding left out
    seconds     that they took
    """

    num_steps: int
    num_tokens: int
    seconds: float
    curve: list[CurvePoint]


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    run: dict[str, Any],
    factors: Factors,
    optimizer: torch.optim.AdamW,
) -> None:
    """Write the state into the folder, in place of the one before, whole or not at all.

    `run` is what decides the run's weights; another run cannot go on from here.
    """
    tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
    for name, factor in factors.trained.items():
        tensors[name] = factor.detach()
        state = optimizer.state[factor]
        tensors |= {f"{name} {moment}": state[moment] for moment in _MOMENTS}
    about = {
        "num_steps": checkpoint.num_steps,
        "num_tokens": checkpoint.num_tokens,
        "seconds": checkpoint.seconds,
        "curve": [[point.step, point.loss, point.validation_loss] for point in checkpoint.curve],
        "run": run,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}"
    save_file(tensors, partial, metadata={"run": json.dumps(about)})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(folder / FILE)


def load_checkpoint(
    folder: Path, run: dict[str, Any], factors: Factors, optimizer: torch.optim.AdamW
) -> Checkpoint:
    """Put the saved state into factors, optimizer and torch's generator.

    Raises ConfigurationError if it is another run's, and says what differs.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} does not exist, so there is no run to go on with; leave --resume out"
        ) from None
    except Exception as error:  # safetensors' own, KeyError, ValueError: not a file of ours
        raise ConfigurationError(f"{path} is no checkpoint: {error}; remove it") from error
    differing = [
        f"  {name}: {about['run'].get(name)!r} then, {value!r} now"
        for name, value in run.items()
        if about["run"].get(name) != value
    ]
    if differing:
        raise ConfigurationError(
            "\n".join([f"{path} is of a run with other settings or data:", *differing])
            + "\ngive the same ones, or leave --resume out to begin anew"
        )
    torch.set_rng_state(tensors["random"])
    for name, factor in factors.trained.items():
        factor.data.copy_(tensors[name])
        optimizer.state[factor] = {moment: tensors[f"{name} {moment}"] for moment in _MOMENTS}
    return Checkpoint(
        about["num_steps"],
        about["num_tokens"],
        about["seconds"],
        [CurvePoint(*point) for point in about["curve"]],
    )
