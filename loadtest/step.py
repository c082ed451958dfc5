"""Where a decode step's time goes: an engine without HTTP, its parts timed one by one."""

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from loadtest.markdown import table
from loadtest.timed_kernels import ADAPTERS, ATTENTION, ELEMENTWISE, PRODUCTS, TimedKernels
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.config import ServeConfig
from sharelora_serve.engine.engine import Engine
from sharelora_serve.engine.load import Loaded, load_engine
from sharelora_serve.engine.request import Request, RequestOutput, SamplingParams
from sharelora_serve.engine.sampler import Sampler

SAMPLING, PYTHON = "sampling", "Python"
_READS = 15  # of all weights in a round; the median is given, as of the steps

PARTS = (PRODUCTS, ADAPTERS, ATTENTION, ELEMENTWISE, SAMPLING, PYTHON)


@dataclass(frozen=True, slots=True)
class Step:
    """One load's decode step, in milliseconds.

    total  the median step of the server's engine
    parts  of a step whose parts are called one by one, by name; PYTHON is what is left of `total`,
           or 0 where calling the parts costs more than that
    """

    streams: int
    num_adapters: int
    total: float
    parts: dict[str, float]

    @property
    def product_share(self) -> float:
        """Of the sum of all parts."""
        return self.parts[PRODUCTS] / sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class StepTimes:
    """All loads, and the milliseconds that reading the weights once takes."""

    steps: list[Step]
    read_weights: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "read_weights_ms": round(self.read_weights, 2),
            "steps": [
                {
                    "streams": step.streams,
                    "adapters": step.num_adapters,
                    "step_ms": round(step.total, 2),
                    "parts_ms": {name: round(value, 2) for name, value in step.parts.items()},
                    "products_share": round(step.product_share, 3),
                    "times_reading_the_weights": round(step.total / self.read_weights, 2),
                }
                for step in self.steps
            ],
        }

    def as_markdown(self) -> str:
        """A table of milliseconds."""
        rows = []
        for step in self.steps:
            times = (step.total, *(step.parts[name] for name in PARTS))
            figures = (str(step.streams), str(step.num_adapters), *(f"{ms:.1f}" for ms in times))
            rows.append((*figures, f"{step.product_share:.0%}"))
        lines = table(("streams", "adapters", "step", *PARTS, "products' share"), rows)
        return f"{lines}\nReading the weights once: {self.read_weights:.1f} ms."


def measure_steps(
    adapters: Path | None,
    *,
    streams: Sequence[int],
    threads: int | None,
    adapter_memory: str,
    num_tokens: int,
    rounds: int,
    model: str | None = None,
) -> StepTimes:
    """Decode with so many streams on the base, and on as many adapters if there is a folder.

    adapter_memory  what --adapter-memory takes; too little, and streams wait for each other
    num_tokens      of every answer; its second half is measured
    rounds          of every load, the medians of which are given
    """
    kernels = TimedKernels()
    with tempfile.TemporaryDirectory() as store:
        settings = {
            "model": model,
            "adapters": adapters,
            "adapter_memory": adapter_memory,
            "store": store,
            "threads": threads,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        config = ServeConfig(
            **given,
            device="cpu",
            prefix_cache=False,
            speculative_tokens=0,
            max_running=max(streams),
        )
        loaded = load_engine(config, kernels=kernels)
        loaded.engine.start()
        try:
            loads = [
                (count, names)
                for count in streams
                for names in _owners(loaded, count, with_adapters=adapters is not None)
            ]
            steps = []
            for _ in range(rounds):
                steps.append([_measure(loaded, kernels, *load, num_tokens) for load in loads])
                kernels.is_reading = True
                _decode(loaded, kernels, [None], _READS)
                kernels.is_reading = False
        finally:
            loaded.engine.stop()
    read = 1000 * statistics.median(kernels.reads)
    return StepTimes([_median(each) for each in zip(*steps, strict=True)], read)


def _owners(loaded: Loaded, count: int, *, with_adapters: bool) -> list[list[AdapterName | None]]:
    """Whom the streams of a load ask: the base, and if there are adapters one each."""
    names = sorted((published.name for published in loaded.registry.adapters()), key=str)
    owners: list[list[AdapterName | None]] = [[None] * count]
    if with_adapters:
        if len(names) < count:
            raise RuntimeError(f"{count} streams need {count} adapters; there are {len(names)}")
        owners.append(list(names[:count]))
    return owners


def _measure(
    loaded: Loaded,
    kernels: TimedKernels,
    count: int,
    owners: list[AdapterName | None],
    num_tokens: int,
) -> Step:
    kernels.is_split = False
    total = _decode(loaded, kernels, owners, num_tokens)
    kernels.is_split = True
    _decode(loaded, kernels, owners, num_tokens)
    kernels.is_split = False
    parts = {ADAPTERS: 0.0, **kernels.milliseconds()}
    parts[SAMPLING] = _sampling_milliseconds(loaded.engine, count)
    parts[PYTHON] = max(0.0, total - sum(parts.values()))
    return Step(count, sum(owner is not None for owner in owners), total, parts)


def _decode(
    loaded: Loaded, kernels: TimedKernels, owners: list[AdapterName | None], num_tokens: int
) -> float:
    """The median milliseconds of a step; the kernels have counted those measured.

    RuntimeError if a stream fails: the others have steps to themselves then.
    """
    generator = random.Random()
    ended = threading.Semaphore(0)
    times: list[float] = []
    errors: list[str] = []

    def deliver(output: RequestOutput) -> None:
        if output.request_id == "0":
            times.append(time.perf_counter())
            if len(times) == num_tokens // 2:
                kernels.clear()
        if output.error is not None:
            errors.append(f"{owners[int(output.request_id)] or 'the base'}: {output.error}")
        if output.finish_reason is not None:
            ended.release()

    vocabulary = loaded.engine.vocab_size
    loaded.engine.submit(
        *(
            Request(
                request_id=str(number),
                adapter=None if owner is None else loaded.registry.find(owner).version,
                prompt_ids=[generator.randrange(vocabulary) for _ in range(8)],
                sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
                arrived_at=time.monotonic(),
                deliver=deliver,
                tenant="step",  # requests that are submitted together are of one client
            )
            for number, owner in enumerate(owners)
        )
    )
    for _ in owners:
        ended.acquire()
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(owners)} streams broke off, such as {errors[0]}")
    measured = times[num_tokens // 2 :]
    return 1000 * statistics.median(later - earlier for earlier, later in pairwise(measured))


def _sampling_milliseconds(engine: Engine, count: int) -> float:
    """The median milliseconds of choosing `count` greedy tokens."""
    sampler = Sampler(engine.vocab_size, engine.eos_token_ids, torch.device("cpu"))
    logits = torch.randn(count, engine.vocab_size)
    greedy = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    requests = [Request(str(row), None, [0], greedy, 0.0, _ignore) for row in range(count)]
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        sampler.sample(logits, requests)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _ignore(_: RequestOutput) -> None:
    """Deliver to nobody."""


def _median(steps: Sequence[Step]) -> Step:
    first = steps[0]
    parts = {name: statistics.median(step.parts[name] for step in steps) for name in first.parts}
    total = statistics.median(step.total for step in steps)
    return Step(first.streams, first.num_adapters, total, parts)
