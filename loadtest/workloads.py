"""The workloads of the field, seeded: the same arguments give the same requests.

Mixed ranks are not a kind of their own but any of these over adapters that
`python -m loadtest adapters --rank 8,64` writes.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice
from types import MappingProxyType

from loadtest.client import random_prompt
from loadtest.questions import QUESTIONS
from loadtest.traffic import power_law
from loadtest.workload import Request, Workload

ZIPF = 1.5

_OF_THE_BASE = ("base", "questions")  # kinds that ask no adapter


@dataclass(frozen=True, slots=True)
class Settings:
    """What a workload is drawn from.

    num_requests    of all tenants; in a burst about as many would come if all kept to their share
    num_adapters    t000, t001, ..., as `python -m loadtest adapters` names them; 0 asks the base
    rate            requests per second, of an open loop; None leaves the pace to the streams
    cv              of the gaps between arrivals: 1 is a Poisson process, more comes in bursts
    exponent        of S-LoRA's power law over adapters: 1 is uniform, less favours few
    prompt_words    (least, most), drawn uniformly; a word is about a token
    new_tokens      (least, most), likewise
    flood           how many times its share the first tenant of a burst sends
    """

    base: str
    num_requests: int
    num_adapters: int
    rate: float | None = None
    cv: float = 1.0
    exponent: float = 1.0
    prompt_words: tuple[int, int] = (32, 32)
    new_tokens: tuple[int, int] = (64, 64)
    flood: float = 10.0
    seed: int = 0


def adapter_name(index: int) -> str:
    """Of the adapter with this index, such as t007."""
    return f"t{index:03d}"


def draw(kind: str, settings: Settings) -> Workload:
    """A workload of one of KINDS. Raises RuntimeError where the settings do not allow it."""
    for what, (least, most) in (
        ("prompt words", settings.prompt_words),
        ("new tokens", settings.new_tokens),
    ):
        if not 1 <= least <= most:
            raise RuntimeError(f"{what}: {least} to {most} is no range of numbers from 1 on")
    if kind not in _OF_THE_BASE and settings.num_adapters < 1:
        raise RuntimeError(
            f"{kind} is a workload over adapters: give --num-adapters, of t000, t001, ... that the "
            "server has; `python -m loadtest adapters FOLDER` writes such"
        )
    return Workload(kind, tuple(KINDS[kind](settings)))


def gamma_arrivals(rate: float, cv: float, generator: random.Random) -> Iterator[float]:
    """Seconds of arrivals, for ever: gaps gamma of shape 1 / cv^2 and scale cv^2 / rate.

    Their mean is 1 / rate, their coefficient of variation cv. S-LoRA's (arXiv 2311.03285, 7.1).
    """
    while_ever = iter(lambda: generator.gammavariate(1 / cv**2, cv**2 / rate), None)
    return accumulate(while_ever)


def popularity(kind: str, num_requests: int, num_adapters: int) -> list[int]:
    """How many requests each adapter gets, the most popular first; their sum is num_requests.

    identical  all to one
    distinct   as evenly as they can be spread over all
    uniform    evenly over ceil(sqrt(num_requests)) of them
    zipf       each ZIPF times as many as the next, from one request on

    Punica's, of a batch of num_requests (arXiv 2310.18547, 7); where it has more adapters than
    there are, these share evenly in uniform and the last one takes the rest in zipf.
    """
    if kind == "zipf":
        counts: list[int] = []
        share = 1.0
        while sum(counts) + int(share) < num_requests and len(counts) < num_adapters - 1:
            counts.append(int(share))
            share *= ZIPF
        return sorted([*counts, num_requests - sum(counts)], reverse=True)
    wanted = {
        "identical": 1,
        "distinct": num_requests,
        "uniform": math.ceil(math.sqrt(num_requests)),
    }[kind]
    used = min(wanted, num_adapters)
    return [num_requests // used + (index < num_requests % used) for index in range(used)]


def _slora(settings: Settings) -> Iterator[Request]:
    generator = random.Random(settings.seed)
    indices = islice(
        power_law(settings.num_adapters, settings.exponent, generator), settings.num_requests
    )
    return _asked([adapter_name(index) for index in indices], settings, generator)


def _popular(kind: str) -> Callable[[Settings], Iterator[Request]]:
    def requests(settings: Settings) -> Iterator[Request]:
        generator = random.Random(settings.seed)
        counts = popularity(kind, settings.num_requests, settings.num_adapters)
        if kind == "distinct":  # in turn, so that neighbours in time never share one
            models = [adapter_name(i % len(counts)) for i in range(settings.num_requests)]
        else:
            models = [adapter_name(i) for i, count in enumerate(counts) for _ in range(count)]
            generator.shuffle(models)
        return _asked(models, settings, generator)

    return requests


def _base(settings: Settings) -> Iterator[Request]:
    models = [settings.base] * settings.num_requests
    return _asked(models, settings, random.Random(settings.seed))


def _questions(settings: Settings) -> Iterator[Request]:
    asked = cycle(QUESTIONS)
    return (replace(request, prompt=next(asked)) for request in _base(settings))


def _burst(settings: Settings) -> Iterator[Request]:
    """Every adapter has a tenant, who sends an equal share; the first one `flood` times that.

    The requests of the other tenants are the same whatever the flood.
    """
    if settings.rate is None:
        raise RuntimeError("a burst needs a rate: in a closed loop nobody can send too much")
    share = settings.rate / settings.num_adapters
    seconds = settings.num_requests / settings.rate
    requests: list[Request] = []
    for index in range(settings.num_adapters):
        generator = random.Random(f"{settings.seed} {index}")
        rate = share * settings.flood if index == 0 else share
        for arrival in gamma_arrivals(rate, settings.cv, generator):
            if arrival >= seconds:
                break
            requests.append(_drawn(arrival, adapter_name(index), settings, generator))
    requests.sort(key=lambda request: request.arrival_seconds or 0.0)
    return iter(requests)


KINDS: Mapping[str, Callable[[Settings], Iterator[Request]]] = MappingProxyType(
    {
        "slora": _slora,
        **{kind: _popular(kind) for kind in ("identical", "distinct", "uniform", "zipf")},
        "base": _base,
        "questions": _questions,
        "burst": _burst,
    }
)


def _asked(models: list[str], settings: Settings, generator: random.Random) -> Iterator[Request]:
    """A request to each of the models, who stand for their tenants too."""
    rate = settings.rate
    arrivals = None if rate is None else gamma_arrivals(rate, settings.cv, generator)
    for model in models:
        arrival = None if arrivals is None else next(arrivals)
        yield _drawn(arrival, model, settings, generator)


def _drawn(
    arrival: float | None, model: str, settings: Settings, generator: random.Random
) -> Request:
    prompt = random_prompt(generator.randint(*settings.prompt_words), generator)
    return Request(arrival, model, prompt, generator.randint(*settings.new_tokens), tenant=model)
