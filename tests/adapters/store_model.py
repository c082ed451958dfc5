"""What a store should hold, in plain dictionaries, and what to do with one."""

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import load_file

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.store import AdapterStore
from sharelora_serve.adapters.summary import summarise
from sharelora_serve.adapters.verify import verify_store
from tests.adapters.shelves import LAYOUT, Content, write_content

KEEP_VERSIONS = 3

NAMES = (AdapterName(None, "red"), AdapterName("acme", "red"), AdapterName("acme", "blue"))
CONTENTS = (
    Content(1, rank=4, a_seed=1),
    Content(2, rank=4, a_seed=1),  # of the same A as the first
    Content(3, rank=3),
    Content(4, rank=5, modules=("self_attn.q_proj", "mlp.up_proj")),
    Content(5, rank=5, modules=("self_attn.q_proj", "mlp.up_proj"), a_seed=2),  # one A for both
)

File = tuple[bytes, ...]
"""The factors in one file, in the order of their rows."""


def write_contents(folder: Path) -> list[Path]:
    """CONTENTS, each in a folder below `folder`, as PEFT saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_content(folder / str(content.seed), content) for content in CONTENTS]


def read_contents(folder: Path) -> list[Adapter]:
    """CONTENTS, as read from the folders that were written there."""
    return [
        read_adapter(folder / str(content.seed), LAYOUT, name="content") for content in CONTENTS
    ]


def files_of(content: Content) -> set[File]:
    """The files that a store needs for a content: one per module and side."""
    seen: set[bytes] = set()
    files: dict[tuple[str, str], list[bytes]] = {}
    for layer in range(LAYOUT.num_layers):
        for module in content.modules:
            for side, factor in zip("AB", content.factors(layer, module), strict=True):
                row = factor.numpy().tobytes()
                if row not in seen:
                    files.setdefault((module, side), []).append(row)
                seen.add(row)
    return {tuple(rows) for rows in files.values()}


def files_needed(digests: set[str], contents: Sequence[Adapter]) -> set[File]:
    """The files of these versions of CONTENTS."""
    pairs = zip(CONTENTS, contents, strict=True)
    return {
        file
        for content, adapter in pairs
        if adapter.digest in digests
        for file in files_of(content)
    }


def files_in(folder: Path) -> set[File]:
    """The files that a store has; no two may hold the same."""
    found = [
        tuple(tensor.numpy().tobytes() for _, tensor in sorted(load_file(path).items()))
        for path in (folder / "factors").iterdir()
    ]
    assert len(set(found)) == len(found), "one matrix is stored twice"
    return set(found)


def problems_in(folder: Path) -> list[str]:
    """What is wrong with a store, by its own account."""
    return verify_store(folder, lambda _done, _total: None)


@dataclass(slots=True)
class ModelAdapter:
    """What one name stands for; `versions` has the one published last first."""

    current: str
    versions: list[str]
    is_pinned: bool = False
    is_from_folder: bool = False


@dataclass(slots=True)
class StoreModel:
    """A store's state; equal states are equal objects."""

    adapters: dict[AdapterName, ModelAdapter] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, store: AdapterStore) -> "StoreModel":
        """What a store says of itself."""
        adapters = {
            stored.name: ModelAdapter(
                stored.digest,
                [version.digest for version in store.versions(stored.name)],
                stored.is_pinned,
                stored.is_from_folder,
            )
            for stored in store.adapters()
        }
        return cls(adapters, store.folders())

    @property
    def digests(self) -> set[str]:
        """Of all versions that a name has."""
        return {digest for adapter in self.adapters.values() for digest in adapter.versions}


Kind = Literal[
    "publish", "publish_folder", "remove", "roll_back", "pin", "unpin", "forget_folder", "collect"
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Operation:
    """One change of a store; `choice` is of a content, or of a version to roll back to."""

    kind: Kind
    name: AdapterName
    choice: int

    @property
    def fingerprint(self) -> str | None:
        """Of the watched folder that is published."""
        return f"fingerprint {self.choice}" if self.kind == "publish_folder" else None

    def run(self, store: AdapterStore, contents: Sequence[Adapter]) -> None:
        """Change a store; the contents are CONTENTS."""
        adapter = contents[self.choice % len(contents)]
        match self.kind:
            case "publish" | "publish_folder":
                store.publish(
                    self.name,
                    adapter,
                    summarise(adapter),
                    keep_versions=KEEP_VERSIONS,
                    fingerprint=self.fingerprint,
                )
            case "remove":
                store.remove(self.name)
            case "roll_back":
                if versions := store.versions(self.name):
                    store.roll_back(self.name, versions[self.choice % len(versions)].digest)
            case "pin" | "unpin":
                store.set_pinned(self.name, self.kind == "pin")
            case "forget_folder":
                store.forget_folder(self.name.name)
            case "collect":
                store.collect({adapter.digest})

    def after(self, before: StoreModel, contents: Sequence[Adapter]) -> StoreModel:
        """The state that the change leads to."""
        model = deepcopy(before)
        adapter = model.adapters.get(self.name)
        match self.kind:
            case "publish" | "publish_folder":
                digest = contents[self.choice % len(contents)].digest
                if adapter is None:
                    is_from_folder = self.fingerprint is not None
                    adapter = ModelAdapter(digest, [], is_from_folder=is_from_folder)
                    model.adapters[self.name] = adapter
                others = [other for other in adapter.versions if other != digest]
                adapter.current, adapter.versions = digest, [digest, *others][:KEEP_VERSIONS]
                if self.fingerprint is not None:
                    model.folders[self.name.name] = self.fingerprint
            case "remove":
                model.adapters.pop(self.name, None)
            case "roll_back" if adapter is not None:
                adapter.current = adapter.versions[self.choice % len(adapter.versions)]
            case "pin" | "unpin" if adapter is not None:
                adapter.is_pinned = self.kind == "pin"
            case "forget_folder":
                model.folders.pop(self.name.name, None)
                public = AdapterName(None, self.name.name)
                if public in model.adapters and model.adapters[public].is_from_folder:
                    del model.adapters[public]
        return model


def operations(seed: int) -> Iterator[Operation]:
    """An endless random sequence, the same for the same seed; most of it publications."""
    draw = random.Random(seed)
    while True:
        kind: Kind = draw.choice(("publish", "publish", *KINDS))
        yield Operation(kind, draw.choice(NAMES), draw.randrange(60))
