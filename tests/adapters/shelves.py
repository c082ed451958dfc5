"""An adapter cache over real folders, and the contents that tests put into them."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, get_ident
from types import TracebackType

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.pages import PAGE_RANK
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.adapters.residency import Waiting

LAYOUT = BaseLayout(
    "tiny",
    num_layers=2,
    shapes={
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (16, 8),
        "self_attn.v_proj": (16, 8),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (16, 32),
        "mlp.up_proj": (16, 32),
        "mlp.down_proj": (32, 16),
    },
)
PATIENCE_SECONDS = 30.0


def wait_until(happened: Callable[[], bool]) -> None:
    """AssertionError if it takes PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Content:
    """What an adapter's files hold: numbers that every type stores exactly, none of them zero.

    Contents of one rank and one a_seed have the same A in every layer and module.
    """

    seed: int
    rank: int
    modules: tuple[str, ...] = ("self_attn.q_proj",)
    a_seed: int | None = None

    @property
    def scaling(self) -> float:
        return 0.5 + self.seed

    def factors(self, layer: int, module: str) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank)."""
        in_features, out_features = LAYOUT.shapes[module]
        own = 1000 * self.seed + 2 * LAYOUT.entry(layer, module)
        a_seed = own if self.a_seed is None else self.a_seed
        return _drawn(a_seed, self.rank, in_features), _drawn(own + 1, out_features, self.rank)

    @property
    def num_bytes(self) -> int:
        """Of its factors in float32, when they all differ."""
        shapes = [LAYOUT.shapes[module] for module in self.modules]
        return 4 * LAYOUT.num_layers * self.rank * sum(map(sum, shapes))


def _drawn(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 9, (rows, columns), generator=generator) / 8.0


def write_content(path: Path, content: Content) -> Path:
    """Save it as PEFT does, over what is there."""
    path.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYOUT.num_layers):
        for module in content.modules:
            key = f"base_model.model.model.layers.{layer}.{module}"
            a, b = content.factors(layer, module)
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(tensors, path / "adapter_model.safetensors")
    alpha = content.scaling * content.rank
    config = {"peft_type": "LORA", "r": content.rank, "lora_alpha": alpha}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


class Shelf:
    """A cache, its pool and its folders; memory that no adapter wrote is NaN.

    names       what is published
    changed_by  the threads that called on_change
    """

    def __init__(
        self, folder: Path, *, pool_bytes: int, host_bytes: int, num_loader_threads: int = 1
    ) -> None:
        self.folder = folder
        self.pool = MatrixPool(pool_bytes, LAYOUT.feature_counts, torch.float32, "cpu")
        self.pool.arena[PAGE_RANK * max(LAYOUT.feature_counts) :] = float("nan")
        self.names: dict[str, AdapterVersion] = {}
        self.changed_by: set[int] = set()
        self._paths: dict[str, Path] = {}  # by digest
        self._changed = Condition()
        self._may_go_on = Event()
        self._may_go_on.set()
        self.cache = AdapterCache(
            LAYOUT,
            self.pool,
            host_bytes,
            lambda version: read_adapter(self._paths[version.digest], LAYOUT, name=version.name),
            num_loader_threads=num_loader_threads,
            on_change=self._on_change,
        )

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cache.close()
        self.pool.check_integrity()

    def path(self, name: str, content: Content) -> Path:
        """Where the content is that was published under this name."""
        return self.folder / f"{name}-{content.seed}-{content.rank}"

    def publish(self, name: str, content: Content) -> AdapterVersion:
        """Publish it from its own folder, which is written once: a load may be reading it."""
        path = self.path(name, content)
        if not path.exists():
            write_content(path, content)
        adapter = read_adapter(path, LAYOUT, name=name)
        self._paths[adapter.digest] = path
        version = AdapterVersion(name, adapter.digest)
        self.cache.admit(version, self.pool.stage(adapter, LAYOUT))
        self.remove(name)
        self.names[name] = version
        return version

    def remove(self, name: str) -> None:
        """Take the name away from its version, if it has one."""
        if name in self.names:
            self.cache.dismiss(self.names.pop(name))

    def load(self, version: AdapterVersion) -> PageTable:
        """Acquire, as often as it takes; AssertionError if there is no room."""
        while not isinstance(answer := self.cache.acquire(version), PageTable):
            assert answer is Waiting.LOADING, f"no room for {version.name}"
            self.wait_for_loads()
        return answer

    def wait_for_loads(self) -> None:
        self._wait(lambda: self.cache.stats().loads_in_progress == 0)

    def wait_for_residents(self, count: int) -> None:
        self._wait(lambda: self.pool.stats().num_adapters == count)

    @contextmanager
    def loader_held(self) -> Iterator[None]:
        """The only loader thread has loaded something and does nothing more until the end."""
        version = self.publish("doorstop", Content(999, rank=1))
        self._may_go_on.clear()
        try:
            self.cache.prefetch(version)
            self.wait_for_loads()
            yield
        finally:
            self._may_go_on.set()

    def assert_reads_back(self, table: PageTable, content: Content) -> None:
        """The page table, followed through the arena, gives the content bit for bit."""
        for layer in range(LAYOUT.num_layers):
            for module in MODULES:
                entry = LAYOUT.entry(layer, module)
                span = slice(table.offsets[entry], table.offsets[entry + 1])
                if module not in content.modules:
                    assert span.start == span.stop, f"{module} has pages of another adapter"
                    continue
                assert (table.scaling[span] == np.float32(content.scaling)).all()
                a, b = content.factors(layer, module)
                for pages, rows in ((table.a_pages, a), (table.b_pages, b.T)):
                    view = self.pool.view(rows.shape[1])
                    held = view[torch.from_numpy(pages[span])].flatten(0, 1)
                    assert len(held) == -(-content.rank // PAGE_RANK) * PAGE_RANK
                    assert torch.equal(held[: content.rank], rows), f"{module} of layer {layer}"
                    assert not held[content.rank :].any(), "padding holds rows of others"

    def _on_change(self) -> None:
        with self._changed:
            self.changed_by.add(get_ident())
            self._changed.notify_all()
        self._may_go_on.wait()

    def _wait(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            while not happened():  # a change that nobody was told of counts as none
                assert self._changed.wait(PATIENCE_SECONDS), "nothing happened"


ONE, TWO, THREE, FOUR = (Content(seed, rank=8) for seed in range(1, 5))
BYTES = ONE.num_bytes  # of each of the four, in the pool and on the host
ROOM_FOR_TWO = 3 * BYTES  # a third goes to page 0 and to what its chunk cannot hold
