"""Factors on disk: safetensors files named by the sha256 of their bytes, and how to find them.

The distinct factors of one module and side are one file, in the order of layers: a shared A is a
file of its own, which every version and tenant that has the same A shares.
"""

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.format import adapter_digest
from sharelora_serve.errors import StorageError

# What a file or a manifest in which bytes were changed can raise.
_DAMAGE = (
    SafetensorError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where a version's factors are.

    files    names in factors/
    factors  (index in files, row in that file) of each distinct factor
    entries  (layer, module, index in factors of A, of B, scaling)
    config   the adapter_config.json that the version came with
    """

    files: list[str]
    factors: list[tuple[int, int]]
    entries: list[tuple[int, str, int, int, float]]
    config: dict[str, Any]

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote; StorageError for anything else."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            raise StorageError(
                "a version's manifest is damaged in the registry; publish it again from a good copy"
            ) from None


class Incoming:
    """The files of one publication, written and synced, on their way into factors/."""

    def __init__(self, folder: Path, manifest: Manifest, paths: dict[str, Path]) -> None:
        """`paths` are of those files that are not in factors/ yet, or damaged there."""
        self._folder = folder
        self._manifest = manifest
        self.paths = paths

    def move_in(self) -> Manifest:
        """Give the files their names, for good; OSError if the disk does not let it."""
        for file, path in self.paths.items():
            path.rename(self._folder / file)
        # Even if no file is new: one may have been moved in by a process that was killed before it
        # came to this.
        _sync(self._folder)
        return self._manifest


class FactorFiles:
    """The files of a store. A whole file is never written again, a damaged one is replaced."""

    def __init__(self, folder: Path) -> None:
        """Keep files in folder/factors, by way of folder/incoming; neither need exist."""
        self._factors = folder / "factors"
        self._incoming = folder / "incoming"

    def clear_incoming(self) -> None:
        """Make the folders, and remove what a process that was killed left half written."""
        for folder in (self._factors, self._incoming):
            folder.mkdir(mode=0o700, exist_ok=True)
            _sync(folder.parent)
        for path in self._incoming.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for an upload, gone afterwards; StorageError if there is no room for one."""
        try:
            # What cannot be deleted goes when the store is opened again; the upload is done.
            with TemporaryDirectory(dir=self._incoming, ignore_cleanup_errors=True) as folder:
                yield Path(folder)
        except OSError as error:
            raise not_written(error) from None

    @contextmanager
    def incoming(self, adapter: Adapter) -> Iterator[Incoming]:
        """Write the files that an adapter needs and are not whole; they go if not moved in.

        Raises StorageError.
        """
        manifest, contents = _pack(adapter)
        paths: dict[str, Path] = {}
        try:
            try:
                for file, content in contents.items():
                    if not _is_whole(self._factors / file):
                        paths[file] = self._incoming / uuid.uuid4().hex
                        _write(paths[file], content)
            except OSError as error:
                raise not_written(error) from None
            yield Incoming(self._factors, manifest, paths)
        finally:
            for path in paths.values():
                # What cannot be deleted goes when the store is opened again. It must not hide why
                # the publication failed, which may be the same disk.
                with suppress(OSError):
                    path.unlink()

    def read(self, digest: str, manifest: Manifest) -> Adapter:
        """A version's factors; StorageError if they are not there, or are not that version's."""
        try:
            pairs = self._pairs(digest, manifest)
            is_whole = adapter_digest(pairs) == digest
        except _DAMAGE:
            is_whole = False
        if not is_whole:
            raise StorageError(
                f"version {digest[:12]} is damaged on disk: its files hold other numbers than were "
                "published; publish it again from a good copy"
            )
        return Adapter(digest[:12], digest, pairs, manifest.config)

    def _pairs(self, digest: str, manifest: Manifest) -> dict[tuple[int, str], FactorPair]:
        """The factors at their places, unchecked; raises StorageError or one of _DAMAGE."""
        tensors: list[dict[str, Tensor]] = []
        for file in manifest.files:
            try:
                content = (self._factors / file).read_bytes()
            except OSError as error:
                raise StorageError(
                    f"factors/{file} of version {digest[:12]}: {error.strerror}"
                ) from None
            tensors.append(load(content))
        factors = [tensors[file][_key(row)] for file, row in manifest.factors]
        return {
            (layer, module): FactorPair(factors[a], factors[b], scaling)
            for layer, module, a, b, scaling in manifest.entries
        }

    def delete_all_but(self, files: Collection[str]) -> tuple[int, int]:
        """Delete every file with another name; return how many there were, and their bytes.

        Raises OSError.
        """
        num_files = num_bytes = 0
        for entry in os.scandir(self._factors):
            if entry.name not in files and not entry.is_dir():  # such as lost+found
                num_bytes += entry.stat().st_size
                num_files += 1
                os.unlink(entry.path)
        return num_files, num_bytes

    def damaged(self) -> list[str]:
        """What is wrong with the files by themselves: each must have the digest it is named by."""
        problems = []
        for path in sorted(path for path in self._factors.glob("*") if not path.is_dir()):
            try:
                digest = _digest(path)
            except FileNotFoundError:  # collected by a server meanwhile
                continue
            except OSError as error:
                problems.append(f"factors/{path.name}: {error.strerror}")
                continue
            if digest != path.name:
                problems.append(f"factors/{path.name}: holds bytes of another digest, {digest}")
        return problems


def not_written(error: Exception) -> StorageError:
    """What a client is told when the disk refused a change, without paths of the server."""
    reason = error.strerror if isinstance(error, OSError) else error
    return StorageError(
        f"the store could not be written: {reason}; nothing was changed. Whoever runs the server "
        "should look at the disk of --store"
    )


def _is_whole(path: Path) -> bool:
    """Whether a file is there and holds the bytes that its name promises."""
    try:
        return _digest(path) == path.name
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(adapter: Adapter) -> tuple[Manifest, dict[str, bytes]]:
    """An adapter as files, by name, and where its factors are in them."""
    groups: dict[tuple[str, str], list[int]] = {}  # of factors, by the first module they serve
    factors: dict[int, Tensor] = {}
    for (_, module), pair in sorted(adapter.pairs.items(), key=lambda item: item[0]):
        for side, factor in (("A", pair.a), ("B", pair.b)):
            if id(factor) not in factors:
                factors[id(factor)] = factor
                groups.setdefault((module, side), []).append(id(factor))
    contents: dict[str, bytes] = {}
    places: dict[int, tuple[int, int]] = {}
    for index, identities in enumerate(groups.values()):
        content = save({_key(row): factors[of] for row, of in enumerate(identities)})
        contents[hashlib.sha256(content).hexdigest()] = content
        places |= {of: (index, row) for row, of in enumerate(identities)}
    order = {identity: index for index, identity in enumerate(places)}
    manifest = Manifest(
        files=list(contents),
        factors=list(places.values()),
        entries=[
            (layer, module, order[id(pair.a)], order[id(pair.b)], pair.scaling)
            for (layer, module), pair in adapter.pairs.items()
        ],
        config=adapter.config,
    )
    return manifest, contents


def _key(row: int) -> str:
    return f"{row:04d}"


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
