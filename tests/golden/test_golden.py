"""Every form of adapter on every base, all in flight at once: the tokens of Hugging Face."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden.adapters import FORMS, PEFT_NAMES
from tests.golden.bases import EMBEDDED, Base, open_base
from tests.golden.reference import TOLERANCE, TOLERANCE_WHILE_MERGED, reference_with_peft
from tests.golden.serving import (
    Case,
    Served,
    assert_equal,
    running_engine,
    serve_together,
)
from tests.tiny_models import ARCHITECTURES


@pytest.fixture(scope="module", params=[*ARCHITECTURES, EMBEDDED])
def base(request: pytest.FixtureRequest, seed: int) -> Iterator[Base]:
    with open_base(request.param, seed) as opened:
        yield opened


def max_owners_in_flight(cases: list[Case], answers: list[Served]) -> int:
    """The most adapters, the base among them, that were between first and last token at once."""
    most = 0
    for moment in (answer.first_order for answer in answers):
        assert moment is not None
        most = max(
            most,
            len(
                {
                    case.adapter
                    for case, answer in zip(cases, answers, strict=True)
                    if answer.first_order <= moment <= answer.last_order
                }
            ),
        )
    return most


def assert_all_right(base: Base, answers: list[Served], tolerance: float = TOLERANCE) -> None:
    for case, served in zip(base.cases, answers, strict=True):
        base.assert_right(case, served, tolerance)


def test_no_adapter_could_be_mistaken_for_the_base_or_another(base: Base) -> None:
    shared = base.references[: len(base.shared_cases)]
    assert [case.adapter for case in base.shared_cases] == [None, *FORMS]
    for index, reference in enumerate(shared):
        for other in shared[:index]:
            difference = (reference.logprobs[0] - other.logprobs[0]).abs().max()
            assert difference > 1000 * TOLERANCE
    unlike_base = [answer.token_ids != shared[0].token_ids for answer in shared[1:]]
    assert sum(unlike_base) > len(FORMS) / 2


def test_every_form_beside_all_others_and_the_base_gives_the_tokens_of_its_folded_model(
    base: Base,
) -> None:
    with running_engine(base.config(kernels="cpu")) as loaded:
        answers = serve_together(loaded, base.cases)
    assert_all_right(base, answers)
    assert max_owners_in_flight(base.cases, answers) > len(FORMS) / 2


def test_the_kernels_in_plain_torch_give_these_tokens_too(base: Base) -> None:
    # SmolLM2 takes plain torch a minute for all forms; they are the same kernels for every base.
    cases = base.cases[:6] if base.name == EMBEDDED else base.cases
    with running_engine(base.config(kernels="reference")) as loaded:
        answers = serve_together(loaded, cases)
    for case, served in zip(cases, answers, strict=True):
        base.assert_right(case, served)


def test_chunks_preemption_eviction_and_reload_change_no_token(base: Base) -> None:
    with running_engine(base.tight_config()) as loaded:
        answers = serve_together(loaded, base.cases)
        stats, adapters = loaded.engine.stats(), loaded.engine.adapters.stats()
    assert_all_right(base, answers)
    assert stats.num_preemptions > 0
    assert adapters.device_evictions > 0
    assert adapters.disk_loads > 0


def test_with_one_adapter_merged_everybody_still_gets_their_own_tokens(
    base: Base, seed: int
) -> None:
    merged = random.Random(f"{seed} {base.name}").choice(list(FORMS))
    with running_engine(base.config(merge=merged)) as loaded:
        answers = serve_together(loaded, base.cases)
    assert_all_right(base, answers, TOLERANCE_WHILE_MERGED)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_adapters_that_int8_holds_exactly_give_the_same_tokens_in_int8(
    architecture: str, seed: int
) -> None:
    merged = random.Random(f"{seed} {architecture}").choice(list(FORMS))
    with open_base(architecture, seed, in_int8=True) as base:
        for settings in ({"kernels": "cpu"}, {"kernels": "reference"}, {"merge": merged}):
            with running_engine(base.config(adapter_dtype="int8", **settings)) as loaded:
                answers = serve_together(loaded, base.cases)
                num_bytes = loaded.engine.adapters.stats().pool.expanded_bytes
            tolerance = TOLERANCE_WHILE_MERGED if "merge" in settings else TOLERANCE
            assert_all_right(base, answers, tolerance)
            assert num_bytes == sum(
                pair.a.numel() + pair.b.numel()
                for adapter in base.adapters.values()
                for pair in adapter.pairs.values()
            )


def test_a_cached_prefix_changes_no_token_and_never_serves_another_adapter(base: Base) -> None:
    half = len(base.shared_cases) // 2
    first, second = base.shared_cases[:half], base.shared_cases[half:]
    num_full = (len(first[0].prompt_ids) - 1) // 16 * 16
    with running_engine(base.config()) as loaded:
        for cases in (first, second):  # the second half finds the prompt of the first, and others
            for case, served in zip(cases, serve_together(loaded, cases), strict=True):
                assert served.num_cached_tokens == 0, case.adapter
                base.assert_right(case, served)
        answers = serve_together(loaded, base.cases)
    for case, served in zip(base.cases, answers, strict=True):
        if case in base.shared_cases:
            assert served.num_cached_tokens == num_full > 0, case.adapter
        base.assert_right(case, served)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's use of it
def test_adapters_that_peft_wrote_or_could_have_written_answer_as_in_peft(seed: int) -> None:
    with open_base("qwen2", seed) as base:
        cases = [case for case in base.shared_cases if case.adapter in PEFT_NAMES]
        with running_engine(base.config()) as loaded:
            answers = serve_together(loaded, cases)
        for case, served in zip(cases, answers, strict=True):
            folder: Path = base.adapters_folder / str(case.adapter)
            assert_equal(
                case,
                served,
                reference_with_peft(base.folder, folder, case.prompt_ids, case.num_tokens),
            )
