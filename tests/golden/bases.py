"""One base with adapters of every form on disk, greedy requests to all, and their right answers."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.config import ServeConfig
from sharelora_serve.kernels.batch import BLOCK_SIZE
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.embedded import embedded_base_folder
from tests.golden.adapters import write_adapters
from tests.golden.reference import (
    TOLERANCE,
    ReferenceAnswer,
    count_sound,
    folded,
    load_reference,
    reference_greedy,
)
from tests.golden.serving import Case, Served, assert_equal, running_engine, serve_together
from tests.tiny_models import write_tiny_model

EMBEDDED = "smollm2-135m"

_LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 5, 48, 63, 64, 65, 9, 100, 130, 250)  # tokens of prompts


@dataclass(frozen=True, slots=True)
class Base:
    """A base, its adapters, and what is right.

    name        EMBEDDED or an architecture
    folder      a Hugging Face folder
    adapters    what each adapter of adapters_folder computes
    cases       requests to the base and every adapter, with prompts of many lengths
    references  what Hugging Face answers to each case
    """

    name: str
    folder: Path
    adapters_folder: Path
    adapters: dict[str, Adapter]
    cases: list[Case]
    references: list[ReferenceAnswer]

    @property
    def shared_cases(self) -> list[Case]:
        """One prompt, which the base and every adapter are asked; these are the first cases."""
        return [case for case in self.cases if case.prompt_ids == self.cases[0].prompt_ids]

    def assert_right(self, case: Case, served: Served, tolerance: float = TOLERANCE) -> None:
        """The answer to one of the cases is the reference's."""
        assert_equal(case, served, self.references[self.cases.index(case)], tolerance)

    def config(self, **settings: Any) -> ServeConfig:
        """A float32 server of this base and all of its adapters, with room for all at once."""
        roomy = {
            "model": str(self.folder),
            "adapters": self.adapters_folder,
            "device": "cpu",
            "dtype": "float32",
            "adapter_memory": "768MiB",
            "kv_memory": "256MiB",
            "max_running": 64,
            "max_batch_tokens": 4096,
            "prefill_chunk": 4096,
            "threads": 2,
        }
        return ServeConfig(**{**roomy, **settings})

    def tight_config(self) -> ServeConfig:
        """A server on which requests must preempt each other and adapters replace each other.

        The KV cache holds no more than the longest request, the device two or three of the
        largest adapter, and the host so few that others are read from disk again.
        """
        model = load_model_config(self.folder)
        longest = max(len(case.prompt_ids) + case.num_tokens for case in self.cases)
        num_blocks = -(-longest // BLOCK_SIZE) + 1  # one is padding
        block_numbers = 2 * BLOCK_SIZE * model.num_kv_heads * model.head_dim * model.num_layers
        sizes = sorted(
            sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.pairs.values())
            for adapter in self.adapters.values()
        )
        return self.config(
            kv_memory=4 * block_numbers * num_blocks,
            adapter_memory=3 * sizes[-1],
            adapter_host_memory=sizes[-1],
            max_running=24,
            max_batch_tokens=96,
            prefill_chunk=48,
        )


def open_base(name: str, seed: int, *, in_int8: bool = False) -> AbstractContextManager[Base]:
    """EMBEDDED, or a tiny random model of the architecture of that name.

    in_int8  the tiny model's adapters are those that int8 holds exactly
    """
    return _embedded_base(seed) if name == EMBEDDED else _tiny_base(name, seed, in_int8)


@contextmanager
def _tiny_base(architecture: str, seed: int, in_int8: bool) -> Iterator[Base]:
    """Prompts of random tokens: around the edges of KV blocks, and beyond every window."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_tiny_model(Path(temporary) / "base", architecture, seed)
        model = load_reference(folder)
        adapters = write_adapters(
            Path(temporary) / "adapters", model, seed, strength=0.5, in_int8=in_int8
        )
        generator = torch.Generator().manual_seed(seed)

        def prompt(length: int) -> list[int]:
            drawn = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
            return list(map(int, drawn))

        shared = prompt(37)
        cases = [Case(name, shared, 8) for name in (None, *adapters)]
        cases += [Case(None, prompt(length), 12) for length in (1, 16, 70, 300)]
        cases += [
            Case(name, prompt(length), 12)
            for name, length in zip(adapters, cycle(_LENGTHS), strict=False)
        ]
        yield _open(architecture, Path(temporary), folder, adapters, cases)


@contextmanager
def _embedded_base(seed: int) -> Iterator[Base]:
    """The base that is served without --model, asked in English."""
    folder = embedded_base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question: list[int] = tokenizer.encode(QUESTION)
    story: list[int] = tokenizer.encode(STORY)
    with tempfile.TemporaryDirectory() as temporary:
        adapters = write_adapters(
            Path(temporary) / "adapters", load_reference(folder), seed, strength=0.4
        )
        cases = [Case(name, question, 10) for name in (None, *adapters)]
        cases += [Case(None, story, 12), Case(None, story[:1], 12)]
        cases += [Case("share-a", story, 12), Case("lora", story[:BLOCK_SIZE], 12)]
        yield _open(EMBEDDED, Path(temporary), folder, adapters, cases)


def _open(
    name: str, temporary: Path, folder: Path, adapters: dict[str, Adapter], cases: list[Case]
) -> Base:
    """Work out the right answers; those of the server are drafts, which save time and no more."""
    base = Base(name, folder, temporary / "adapters", adapters, cases, references=[])
    with running_engine(base.config()) as engine:
        drafts = [served.token_ids for served in serve_together(engine, cases)]
    model = load_reference(folder)
    for case, draft in zip(cases, drafts, strict=True):
        adapter = None if case.adapter is None else adapters[case.adapter]
        base.references.append(_reference(model, adapter, case, draft))
    return base


def _reference(
    model: PreTrainedModel, adapter: Adapter | None, case: Case, draft: list[int]
) -> ReferenceAnswer:
    """What reference_greedy answers, in one pass as far as the draft says the same."""
    with folded(model, adapter), torch.inference_mode():
        logits = model(
            input_ids=torch.tensor([case.prompt_ids + draft[:-1]]), logits_to_keep=case.num_tokens
        ).logits[0]
        num_sound = count_sound(model, case.prompt_ids + draft[:-1], case.num_tokens)
    logprobs = logits.log_softmax(dim=-1)
    token_ids: list[int] = logprobs.argmax(dim=-1).tolist()
    for step in range(case.num_tokens - 1):
        if token_ids[step] != draft[step]:  # what comes after it was asked of another text
            found = token_ids[: step + 1]
            rest = reference_greedy(
                model, adapter, case.prompt_ids + found, case.num_tokens - len(found)
            )
            return ReferenceAnswer(
                found + rest.token_ids,
                torch.cat([logprobs[: step + 1], rest.logprobs]),
                min(num_sound, step + 1),
            )
    return ReferenceAnswer(token_ids, logprobs, num_sound)


QUESTION = (
    "The harbour town has one street, two inns and a lighthouse that nobody has climbed for years. "
    "The three things that a visitor should see there are"
)
STORY = (
    "When the last ferry of the evening had left, the keeper of the lighthouse climbed down to the "
    "pier, as he had done every night for thirty years, and counted the boats. There were nine. In "
    "the morning there had been ten, and nobody in the village had gone out since the storm. He "
    "counted them again, slowly, with his lamp held high, and then he saw that the water where the "
    "tenth had been was perfectly still, although the wind blew hard from the north and everything "
    "else in the harbour moved. He went back up, took the old book from its shelf, opened it where "
    "the ribbon lay, and began to write down what he had seen, as his father had done before him:"
)
