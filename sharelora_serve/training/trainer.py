"""The training loop: AdamW on the factors, the loss on answers alone."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from sharelora_serve.errors import ConfigurationError
from sharelora_serve.training.batches import Batch, Batches, in_order_of_length
from sharelora_serve.training.checkpoint import (
    Checkpoint,
    CurvePoint,
    load_checkpoint,
    save_checkpoint,
)
from sharelora_serve.training.data import Row
from sharelora_serve.training.factors import Factors
from sharelora_serve.training.settings import TrainSettings

_CLIP = 1.0  # norm of all gradients together


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run can tell after a step."""

    step: int
    num_steps: int
    loss: float
    validation_loss: float | None
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Trained:
    """How a run ended; it is not complete if it was stopped."""

    is_complete: bool
    num_steps: int
    num_tokens: int
    seconds: float
    curve: list[CurvePoint]

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and answers, without padding."""
        return self.num_tokens / self.seconds


class Trainer:
    """A model with factors, and the rows that they learn from."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a Hugging Face causal language model
        factors: Factors,
        rows: Sequence[Row],
        held_out: Sequence[Row],
        settings: TrainSettings,
        run: dict[str, Any],
    ) -> None:
        """`run` is what decides the weights, in words that a checkpoint can keep."""
        self._model = model
        self._factors = factors
        self._batches = Batches(rows, settings.batch_size, settings.seed)
        self._held_out = in_order_of_length(held_out, settings.batch_size)
        self._settings = settings
        self._run = run
        self.num_steps = settings.num_steps or math.ceil(
            settings.num_epochs * self._batches.num_in_epoch
        )
        self._optimizer = torch.optim.AdamW(
            factors.trained.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True
        )

    def train(
        self,
        checkpoints: Path,
        *,
        save_every: int,
        evaluate_every: int,
        resume: bool,
        stop: threading.Event,
        report: Callable[[Progress], None],
    ) -> Trained:
        """Take all steps, or those that are left, and keep a checkpoint in the folder.

        Once `stop` is set, the step that runs is the last. Raises ConfigurationError if there is
        nothing to resume, or loss or gradients are no longer finite.
        """
        torch.manual_seed(self._settings.seed)
        self._model.train()
        done = Checkpoint(0, 0, 0.0, [])
        if resume:
            done = load_checkpoint(checkpoints, self._run, self._factors, self._optimizer)
        curve, num_tokens = list(done.curve), done.num_tokens
        began_at = time.monotonic() - done.seconds
        step = done.num_steps
        is_stopped = stop.is_set()
        while step < self.num_steps and not is_stopped:
            batch = self._batches[step]
            loss = self._take_step(step, batch)
            step, num_tokens = step + 1, num_tokens + batch.num_tokens
            is_last = step == self.num_steps
            is_evaluated = self._held_out and (step % evaluate_every == 0 or is_last)
            validation_loss = self.validation_loss() if is_evaluated else None
            seconds = time.monotonic() - began_at
            curve.append(CurvePoint(step, loss, validation_loss))
            report(Progress(step, self.num_steps, loss, validation_loss, num_tokens / seconds))
            is_stopped = stop.is_set()
            if step % save_every == 0 or is_last or is_stopped:
                state = Checkpoint(step, num_tokens, seconds, curve)
                save_checkpoint(checkpoints, state, self._run, self._factors, self._optimizer)
        seconds = time.monotonic() - began_at
        return Trained(step == self.num_steps, step, num_tokens, seconds, curve)

    def loss(self, batch: Batch) -> Tensor:
        """The mean cross entropy over the tokens of answers."""
        # The head is a good part of a small model: only what predicts an answer goes through it.
        num_common = 0 if self._settings.dropout else batch.num_common
        hidden = self._hidden(batch.tokens, num_common)
        predicting = hidden[:, :-1][batch.labelled[:, num_common + 1 :]]
        return cross_entropy(self._model.lm_head(predicting), batch.tokens[batch.labelled])

    def _hidden(self, tokens: Tensor, num_common: int) -> Tensor:
        """Final hidden states of all tokens after the first num_common, (rows, tokens, features).

        What all rows begin with is computed once: its keys and values stand before every row's
        own, and gradients of all rows add up in them.
        """
        decoder = self._model.model
        if not num_common:
            hidden: Tensor = decoder(input_ids=tokens, use_cache=False).last_hidden_state
            return hidden
        cache = DynamicCache()
        decoder(input_ids=tokens[:1, :num_common], cache=cache, use_cache=True)
        cache.batch_repeat_interleave(len(tokens))
        own = decoder(input_ids=tokens[:, num_common:], cache=cache, use_cache=True)
        hidden = own.last_hidden_state
        return hidden

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean cross entropy over the tokens of all held-out answers."""
        self._model.eval()
        weighted = [
            (self.loss(batch).item(), int(batch.labelled.sum())) for batch in self._held_out
        ]
        self._model.train()
        return sum(loss * count for loss, count in weighted) / sum(count for _, count in weighted)

    def _take_step(self, step: int, batch: Batch) -> float:
        rate = self._settings.learning_rate * self._share_of_rate(step)
        self._optimizer.param_groups[0]["lr"] = rate
        loss = self.loss(batch)
        value = loss.item()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not say what it takes
        norm = nn.utils.clip_grad_norm_(self._factors.trained.values(), _CLIP).item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise ConfigurationError(
                f"step {step + 1} has a loss of {value:g} and gradients of norm {norm:g}; begin "
                f"anew and give a lower --learning-rate than {self._settings.learning_rate:g}"
            )
        self._optimizer.step()
        return value

    def _share_of_rate(self, step: int) -> float:
        """Of the learning rate, in a step: up to 1 while it warms up, then as the schedule says."""
        num_warm = round(self._settings.warm_up * self.num_steps)
        if step < num_warm:
            return (step + 1) / num_warm
        left = (self.num_steps - step) / max(1, self.num_steps - num_warm)
        if self._settings.schedule == "constant":
            return 1.0
        if self._settings.schedule == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return left
