"""The engine on its own thread: full queues, refusals, stops, and what ends it."""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sharelora_serve.engine.batch import ScheduledRequest
from sharelora_serve.engine.engine import Engine
from sharelora_serve.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from sharelora_serve.errors import (
    ContextLengthError,
    EngineStoppedError,
    OverloadedError,
    QueueFullError,
)
from tests.engine.stepping import TinyModel
from tests.tiny_models import write_tiny_model

PATIENCE_SECONDS = 60.0
PROMPT = list(range(100, 150))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, seed: int) -> TinyModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2", seed)
    return TinyModel(folder, folder, torch.float32)


class Mail:
    """The outputs of an engine that runs on its own thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def submit(
        self, request_id: str, prompt_ids: list[int], tenant: str | None = None, **sampling: Any
    ) -> None:
        self._engine.submit(
            Request(
                request_id=request_id,
                adapter=None,
                prompt_ids=prompt_ids,
                sampling=SamplingParams(**sampling),
                arrived_at=time.monotonic(),
                deliver=self._outputs.put,
                tenant=tenant,
            )
        )

    def last_outputs(self, count: int) -> dict[str, RequestOutput]:
        """The last output of so many requests, by id."""
        last: dict[str, RequestOutput] = {}
        while len(last) < count:
            output = self._outputs.get(timeout=PATIENCE_SECONDS)
            if output.finish_reason is not None:
                assert output.request_id not in last, "two last outputs"
                last[output.request_id] = output
        return last

    def assert_takes_no_more(self) -> None:
        """Of an engine that ends or has ended."""
        self._engine._thread.join(PATIENCE_SECONDS)
        assert not self._engine.is_alive
        assert not self._engine.is_ready
        with pytest.raises(EngineStoppedError):
            self.submit("late", PROMPT, max_tokens=1)


def hold(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """Make the engine's steps wait: an event set when one does, and one that lets them go on."""
    waits, may_go_on = threading.Event(), threading.Event()
    run = engine._runner.run

    def run_later(scheduled: Sequence[ScheduledRequest]) -> tuple[Tensor, list[slice]]:
        waits.set()
        assert may_go_on.wait(PATIENCE_SECONDS)
        return run(scheduled)

    monkeypatch.setattr(engine._runner, "run", run_later)
    return waits, may_go_on


def test_a_full_queue_refuses_further_requests_and_answers_those_it_took(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.engine([], max_running=1, max_queue=3) as stepped:
        engine, mail = stepped.engine, Mail(stepped.engine)
        waits, may_go_on = hold(engine, monkeypatch)
        engine.start()
        mail.submit("running", PROMPT, max_tokens=2)
        assert waits.wait(PATIENCE_SECONDS)
        for index in range(3):
            mail.submit(f"waiting-{index}", PROMPT, max_tokens=2)
        with pytest.raises(QueueFullError) as refused:
            mail.submit("one too many", PROMPT, max_tokens=2)
        assert refused.value.status == 429
        assert refused.value.retry_after_seconds > 0
        may_go_on.set()
        last = mail.last_outputs(4)
        assert all(output.finish_reason is FinishReason.LENGTH for output in last.values())
        mail.submit("afterwards", PROMPT, max_tokens=2)
        mail.last_outputs(1)
        engine.stop()


def test_in_a_full_queue_who_has_most_waiting_makes_room_for_others(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.engine([], max_running=1, max_queue=3) as stepped:
        engine, mail = stepped.engine, Mail(stepped.engine)
        waits, may_go_on = hold(engine, monkeypatch)
        engine.start()
        mail.submit("running", PROMPT, max_tokens=2, tenant="flood")
        assert waits.wait(PATIENCE_SECONDS)
        for index in range(3):
            mail.submit(f"flood-{index}", PROMPT, max_tokens=2, tenant="flood")
        mail.submit("quiet", PROMPT, max_tokens=2, tenant="quiet")
        with pytest.raises(QueueFullError):
            mail.submit("one too many", PROMPT, max_tokens=2, tenant="flood")
        with pytest.raises(QueueFullError):  # it would then have as many as the other
            mail.submit("quiet too", PROMPT, max_tokens=2, tenant="quiet")
        may_go_on.set()
        last = mail.last_outputs(5)
        assert isinstance(last["flood-2"].error, QueueFullError)
        assert all(last[each].error is None for each in last.keys() - {"flood-2"})
        assert engine.stats().num_waiting == 0
        engine.stop()


def test_a_request_that_would_start_too_late_is_refused_and_others_are_not(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.engine([], max_running=1, max_first_token_seconds=1e-3) as stepped:
        engine, mail = stepped.engine, Mail(stepped.engine)
        waits, may_go_on = hold(engine, monkeypatch)
        engine.start()
        mail.submit("running", PROMPT, max_tokens=2, tenant="flood")
        assert waits.wait(PATIENCE_SECONDS)
        mail.submit("waiting", PROMPT, max_tokens=2, tenant="flood")
        time.sleep(2e-3)
        with pytest.raises(OverloadedError) as refused:
            mail.submit("late", PROMPT, max_tokens=2, tenant="flood")
        assert refused.value.status == 429
        assert refused.value.retry_after_seconds >= 1
        mail.submit("quiet", PROMPT, max_tokens=2, tenant="quiet")
        may_go_on.set()
        assert all(output.error is None for output in mail.last_outputs(3).values())
        engine.stop()


def test_a_request_that_the_kv_cache_can_never_hold_is_refused_at_once(model: TinyModel) -> None:
    with model.engine([], num_blocks=4) as stepped:
        stepped.engine.start()
        mail = Mail(stepped.engine)
        with pytest.raises(ContextLengthError, match="50 tokens and max_tokens 15 exceed the 64"):
            mail.submit("too long", PROMPT, max_tokens=15)
        mail.submit("fits", PROMPT, max_tokens=14)
        assert mail.last_outputs(1)["fits"].finish_reason is FinishReason.LENGTH
        stepped.engine.stop()


def test_stop_answers_running_waiting_and_unseen_requests_and_takes_no_more(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.engine([], max_running=2) as stepped:
        engine, mail = stepped.engine, Mail(stepped.engine)
        waits, may_go_on = hold(engine, monkeypatch)
        engine.start()
        assert engine.is_ready
        for index in range(5):
            mail.submit(f"early-{index}", PROMPT, max_tokens=400)
        assert waits.wait(PATIENCE_SECONDS)
        mail.submit("unseen", PROMPT, max_tokens=400)
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        may_go_on.set()
        last = mail.last_outputs(6)
        stopping.join(PATIENCE_SECONDS)
        for output in last.values():
            assert output.finish_reason is FinishReason.ERROR
            assert isinstance(output.error, EngineStoppedError)
        mail.assert_takes_no_more()


def test_a_bug_that_ends_the_engines_thread_answers_everyone_before(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.engine([]) as stepped:
        engine, mail = stepped.engine, Mail(stepped.engine)
        waits, may_go_on = hold(engine, monkeypatch)
        engine.start()
        mail.submit("running", PROMPT, max_tokens=400)
        assert waits.wait(PATIENCE_SECONDS)

        def fail() -> None:
            raise RuntimeError("injected")

        monkeypatch.setattr(engine._scheduler, "schedule", fail)
        may_go_on.set()
        last = mail.last_outputs(1)
        assert isinstance(last["running"].error, EngineStoppedError)
        mail.assert_takes_no_more()


def test_a_device_that_computes_nothing_any_more_ends_the_engine(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.engine([]) as stepped:
        engine, mail = stepped.engine, Mail(stepped.engine)
        engine.start()
        mail.submit("before", PROMPT, max_tokens=2)
        assert mail.last_outputs(1)["before"].finish_reason is FinishReason.LENGTH

        def fail(_: Sequence[ScheduledRequest]) -> tuple[Tensor, list[slice]]:
            raise RuntimeError("injected")

        monkeypatch.setattr(engine._runner, "run", fail)
        mail.submit("meanwhile", PROMPT, max_tokens=2)
        assert mail.last_outputs(1)["meanwhile"].finish_reason is FinishReason.ERROR
        mail.assert_takes_no_more()
