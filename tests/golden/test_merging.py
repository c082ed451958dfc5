"""Adapters merged and un-merged at any step, between any requests: the tokens of Hugging Face."""

import random
from collections.abc import Iterator, Mapping

import pytest
import torch

from sharelora_serve.engine.merge_policy import Merge, MergePolicy, Unmerge
from tests.engine.stepping import SteppedEngine, TinyModel
from tests.golden.bases import Base, open_base
from tests.golden.serving import NUM_TOP, Case, Served

NAMES = ("lora", "share-a", "share-qkv-ab", "patterns", "some-layers-share-ab")


class AtRandom(MergePolicy):
    """Whatever the traffic: in most steps it merges one that has tokens, or un-merges."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.merges: list[str] = []
        self._drawn = random.Random(seed)

    def observe(self, now: float, num_tokens: Mapping[str | None, int]) -> Merge | Unmerge | None:
        if self._drawn.random() < 0.2:
            return None
        if self._merged is not None:
            self.unmerged(now)
            return Unmerge("so it was drawn")
        owner = self._drawn.choice(sorted(num_tokens, key=str))
        if owner is None:
            return None
        self._merged = owner
        self.merges.append(owner)
        return Merge(owner, "so it was drawn")


class AsTold(MergePolicy):
    """Whatever the traffic: says what the test wants next."""

    say: Merge | Unmerge | None = None

    def observe(self, *_: object) -> Merge | Unmerge | None:
        said, self.say = self.say, None
        return said


@pytest.fixture(scope="module", params=["llama-bias", "smollm", "qwen3"])
def base(request: pytest.FixtureRequest, seed: int) -> Iterator[Base]:
    with open_base(request.param, seed) as opened:
        yield opened


def submit(engine: SteppedEngine, request_id: str, case: Case) -> None:
    engine.submit(
        request_id,
        case.adapter,
        case.prompt_ids,
        max_tokens=case.num_tokens,
        temperature=0.0,
        ignore_eos=True,
        logprobs=NUM_TOP,
    )


def served(engine: SteppedEngine, request_id: str) -> Served:
    answer = engine.answers[request_id]
    assert answer.error is None
    return Served(
        token_ids=answer.token_ids,
        logprobs=[one for output in answer.outputs for one in output.logprobs or []],
    )


def test_merging_and_unmerging_between_any_steps_change_no_token(base: Base, seed: int) -> None:
    cases = [case for case in base.cases if case.adapter in (None, *NAMES)]
    model = TinyModel(base.folder, base.adapters_folder, torch.float32)
    before = [getattr(model.decoder.weights.layers, name).copy() for name in ("qkv", "down")]
    policy = AtRandom(seed)
    with model.engine(
        NAMES, max_batch_tokens=64, prefill_chunk=24, prefix_caching=False, merge_policy=policy
    ) as engine:
        for index, case in enumerate(cases):
            submit(engine, f"case-{index}", case)
        engine.drain()
        answers = [served(engine, f"case-{index}") for index in range(len(cases))]
        stats = engine.engine.stats()
        engine.check_that_nothing_is_held()
    for case, answer in zip(cases, answers, strict=True):
        base.assert_right(case, answer)
    assert stats.num_merges > 3
    assert stats.num_unmerges > 3
    assert len(set(policy.merges)) > 1
    after = [getattr(model.decoder.weights.layers, name) for name in ("qkv", "down")]
    assert all((now == was).all() for now, was in zip(after, before, strict=True))


def test_requests_in_flight_before_during_and_after_a_merge_keep_their_tokens(
    base: Base, seed: int
) -> None:
    cases = [case for case in base.shared_cases if case.adapter in (None, *NAMES)]
    merged = random.Random(f"{seed} {base.name}").choice(NAMES)
    model = TinyModel(base.folder, base.adapters_folder, torch.float32)
    policy = AsTold()
    with model.engine(NAMES, merge_policy=policy, prefill_chunk=128) as engine:
        for case in cases:
            submit(engine, str(case.adapter), case)
        while not all(answer.token_ids for answer in engine.answers.values()):
            engine.step()
        policy.say = Merge(engine.versions[merged].key, "so it was told")
        engine.step()  # after which the weights are folded
        assert engine.engine.stats().merged_adapter is None
        engine.step()
        assert engine.engine.stats().merged_adapter == merged
        policy.say = Unmerge("so it was told")
        engine.step()
        assert engine.engine.stats().merged_adapter is None
        assert engine.engine.stats().num_running == len(cases)  # all the while
        engine.drain()
        for case in cases:
            base.assert_right(case, served(engine, str(case.adapter)))
