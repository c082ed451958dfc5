"""The right answers: Hugging Face's own model with W + s B A folded into its weights, in float32.

Nothing of the server computes here; only the adapter's reader is shared, and reference_with_peft
goes without that as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sharelora_serve.adapters.adapter import Adapter

TOLERANCE = 1e-4
"""How far a served log probability may be from the reference's, both computed in float32.

Either differs from float64 by 1e-5 on a tiny model and by 2.5e-5 on SmolLM2.
"""

TOLERANCE_WHILE_MERGED = 2e-4
"""The same while an adapter is folded into the weights: for all others it is taken out again, and
the weights' last bits are lost in between. Of 1,500 such steps of SmolLM2 one was off by 1.1e-4."""

UNSOUND_MOVE = 6e-5
"""What rounding moves a log probability by where something is wrong: 3e-5 is usual."""


@dataclass(frozen=True, slots=True)
class ReferenceAnswer:
    """A greedy continuation.

    token_ids  the most likely token of every step
    logprobs   (num_tokens, vocab_size) float32, natural-log probabilities at every step
    num_sound  steps before the first at which float32 itself does not determine them
    """

    token_ids: list[int]
    logprobs: Tensor
    num_sound: int | None = None  # None for all

    def count_clear(self, tolerance: float = TOLERANCE) -> int:
        """Steps before the first whose two best tokens may change places.

        That is when either may be off by the tolerance. From there on rounding decides what the
        answer is, and no comparison means anything. With a tolerance of 1e-4 it happens about once
        in 2,500 steps of a tiny model.
        """
        best, second = self.logprobs.topk(2).values.unbind(dim=1)
        ambiguous = (best - second < 2 * tolerance).nonzero()
        num_decided = int(ambiguous[0]) if len(ambiguous) else len(self.token_ids)
        return num_decided if self.num_sound is None else min(num_decided, self.num_sound)


def load_reference(model_folder: Path) -> PreTrainedModel:
    """The Hugging Face model of a folder, in float32 on the CPU."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return model  # from_pretrained leaves it in evaluation mode


@contextmanager
def folded(model: PreTrainedModel, adapter: Adapter | None) -> Iterator[None]:
    """Hold W + scaling * B A in place of each adapted W; on leaving, the very same W again."""
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for (layer, module), pair in (adapter.pairs if adapter is not None else {}).items():
            weight = model.model.layers[layer].get_submodule(module).weight.data
            originals.append((weight, weight.clone()))
            weight += pair.scaling * (pair.b.float() @ pair.a.float())
        yield
    finally:
        for weight, original in originals:
            weight.copy_(original)


@torch.inference_mode()
def count_sound(model: PreTrainedModel, token_ids: list[int], num_tokens: int) -> int:
    """Of the last num_tokens steps, those before the first that rounding alone moves.

    SmolLM2 with a random adapter has rare steps at which a change of the embeddings by half a unit
    in the last place moves log probabilities by 1e-4 and more, in float64 too: no two
    implementations agree there, nor does Hugging Face with itself when it goes step by step.
    """
    embeddings = model.get_input_embeddings()(torch.tensor([token_ids]))
    generator = torch.Generator().manual_seed(0)
    runs = []
    for size in (0.0, 1e-7, 1e-7, 1e-7):
        noise = size * torch.randn(embeddings.shape, generator=generator)
        output = model(inputs_embeds=embeddings * (1 + noise), logits_to_keep=num_tokens)
        runs.append(output.logits[0].log_softmax(dim=-1))
    likely = runs[0].topk(6).indices
    moved = [(run - runs[0]).gather(1, likely).abs().amax(dim=1) for run in runs[1:]]
    unsound = (torch.stack(moved).amax(dim=0) > UNSOUND_MOVE).nonzero()
    return int(unsound[0]) if len(unsound) else num_tokens


def reference_greedy(
    model: PreTrainedModel, adapter: Adapter | None, prompt_ids: list[int], num_tokens: int
) -> ReferenceAnswer:
    """What `model` with `adapter` folded in, or as it is for None, answers to a prompt."""
    with folded(model, adapter):
        return _greedy(model, prompt_ids, num_tokens)


def reference_with_peft(
    model_folder: Path, adapter_folder: Path, prompt_ids: list[int], num_tokens: int
) -> ReferenceAnswer:
    """What PEFT answers, which reads the adapter's folder itself and folds nothing."""
    model = PeftModel.from_pretrained(load_reference(model_folder), adapter_folder)
    return _greedy(model, prompt_ids, num_tokens)


@torch.inference_mode()
def _greedy(
    model: PreTrainedModel | PeftModel, prompt_ids: list[int], num_tokens: int
) -> ReferenceAnswer:
    token_ids: list[int] = []
    logprobs: list[Tensor] = []
    cache = None
    for _ in range(num_tokens):
        new_ids = prompt_ids if cache is None else token_ids[-1:]
        output = model(
            input_ids=torch.tensor([new_ids]),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.cache
        logprobs.append(output.logits[0, -1].log_softmax(dim=-1))
        token_ids.append(int(logprobs[-1].argmax()))
    return ReferenceAnswer(token_ids, torch.stack(logprobs))
