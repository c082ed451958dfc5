"""What a training run is told: all that decides the weights it ends with."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import QKV_MODULES
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.training.counts import Method

Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The settings of a run. Equal settings and data give equal weights on the same machine.

    modules        of MODULES, which are adapted
    method         which factors layers share, and which are trained
    freeze_a_from  where a frozen A comes from: a seed, or an adapter's folder; None for `seed`
    alpha          delta W = alpha / rank * B A, or alpha / sqrt(rank) * B A if rslora, which is
                   arXiv 2312.03732
    warm_up        share of the steps in which the learning rate rises
    num_steps      None for as many as num_epochs has
    batch_size     rows in a step
    max_length     tokens of a row, prompt and answer; None for the base's context
    """

    modules: tuple[str, ...]
    method: Method
    freeze_a_from: int | Path | None = None
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    learning_rate: float = 3e-3
    schedule: Schedule = "linear"
    warm_up: float = 0.05
    num_steps: int | None = None
    num_epochs: float = 1.0
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0


def default_learning_rate(method: Method, freeze_a_from: int | Path | None) -> float:
    """What the sweep in docs/quality.md found best for a form, over its two tasks together."""
    has_random_a = method.freeze_a and not isinstance(freeze_a_from, Path)
    return 1e-2 if has_random_a or method.share == "AB" else 3e-3


def check_settings(settings: TrainSettings, layout: BaseLayout, max_model_len: int) -> None:
    """Raise ConfigurationError for numbers with which no adapter of the base can be trained."""
    numbers = {
        "--alpha": settings.alpha,
        "--learning-rate": settings.learning_rate,
        "--epochs": settings.num_epochs,
    }
    for option, value in numbers.items():
        if not math.isfinite(value):
            raise ConfigurationError(f"{option} is {value}, expected a finite number")
    if settings.alpha == 0:
        raise ConfigurationError("--alpha 0 is an adapter that changes nothing; give another")
    if settings.rank > layout.feature_counts[-1]:
        raise ConfigurationError(
            f"--rank {settings.rank} is more than the {layout.feature_counts[-1]} features of the "
            "widest layer; give a lower one"
        )
    if (settings.max_length or 0) > max_model_len:
        raise ConfigurationError(
            f"--max-length {settings.max_length} is more than the base's context of "
            f"{max_model_len} tokens, so such rows could not be served; give a lower one"
        )


def check_method(method: Method, modules: tuple[str, ...]) -> None:
    """Raise ConfigurationError if the parts of a method do not go together."""
    if method.share_only is not None:
        if not method.share:
            raise ConfigurationError("--share-only says where layers share; give --share too")
        missing = [module for module in method.share_only if module not in modules]
        if missing:
            raise ConfigurationError(
                f"--share-only names {', '.join(missing)}, which --modules leaves out"
            )
    if method.share_qkv:
        if "A" not in method.share:
            raise ConfigurationError("--share-qkv shares an A; give --share A or AB too")
        qkv = [module for module in QKV_MODULES if method.shares(module, "A")]
        if len([module for module in qkv if module in modules]) < 2:
            raise ConfigurationError(
                "--share-qkv needs at least two of q_proj, k_proj and v_proj that share"
            )
