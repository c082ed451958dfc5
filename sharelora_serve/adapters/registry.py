"""What adapter names stand for: publication, removal, rollback and pins, while requests run."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion
from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import AdapterName, check_name
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.adapters.published import (
    Published,
    check_expected,
    check_not_uploaded,
    choose_version,
)
from sharelora_serve.adapters.staging import StagedAdapter
from sharelora_serve.adapters.store import AdapterStore, StoredVersion
from sharelora_serve.adapters.summary import AdapterSummary, summarise
from sharelora_serve.errors import (
    AdapterInvalidError,
    ModelNotFoundError,
    PinsFullError,
    ServeError,
    StorageError,
)

logger = logging.getLogger(__name__)

# Of the device's memory; the rest is for all others, who would else never be served.
_MOST_PINNED = 0.5

# How long after a change the files that it left without a name are looked for, so that many
# changes cost one look; and how often they are looked for while running requests may need them.
_COLLECT_SECONDS = 2.0
_RETRY_SECONDS = 30.0  # after a disk failed


class AdapterRegistry:
    """Names to versions, in memory for requests and in the store for good.

    `bind`, `unbind`, `find` and `adapters` only look up and may be called on the event loop; all
    others block on the disk. All are thread-safe. A change is on disk when its call returns, and
    every later `bind` sees it; what was bound before ends on the version that it was bound to.
    """

    def __init__(
        self,
        layout: BaseLayout,
        store: AdapterStore,
        pool: MatrixPool,
        cache: AdapterCache,
        *,
        keep_versions: int,
    ) -> None:
        """Know what the store knows; no factor is read but those of pinned adapters."""
        self._layout = layout
        self._store = store
        self._pool = pool
        self._cache = cache
        self._keep_versions = keep_versions
        self._changing = Lock()  # one change at a time: what it checked holds until it is done
        self._lock = Lock()  # guards what follows, for bookkeeping only
        self._published: dict[AdapterName, Published] = {}
        self._pinned_bytes: dict[AdapterName, int] = {}
        for stored in store.adapters():
            version = _version(stored.name, stored.digest)
            cache.admit(version)
            self._published[stored.name] = Published(
                stored.name,
                version,
                stored.summary,
                stored.is_pinned,
                stored.is_from_folder,
                stored.created_at,
            )
            if stored.is_pinned:
                self._pin_again(stored.name, version)
        self._is_closed = Event()
        self._has_changed = Event()
        self._has_changed.set()
        self._collector = Thread(target=self._collect, name="adapter-collector", daemon=True)
        self._collector.start()

    @property
    def base_name(self) -> str:
        """What no adapter can be called."""
        return self._layout.name

    def close(self) -> None:
        """Stop the collector; the store and the cache are closed by whoever made them."""
        self._is_closed.set()
        self._has_changed.set()
        self._collector.join()

    def adapters(self) -> list[Published]:
        """Every name and what it stands for, in no order: of thousands it would cost."""
        with self._lock:
            return list(self._published.values())

    def find(self, *names: AdapterName) -> Published:
        """What the first of the names that is known stands for, or ModelNotFoundError."""
        with self._lock:
            return self._find(names)

    def bind(self, *names: AdapterName) -> AdapterVersion:
        """The version that the first known name stands for, kept until `unbind`.

        Raises ModelNotFoundError.
        """
        with self._lock:  # a change of name waits: a version that is named is not forgotten
            version = self._find(names).version
            self._cache.bind(version)
            return version

    def unbind(self, version: AdapterVersion) -> None:
        """The request that `bind` was called for has ended."""
        self._cache.unbind(version)

    def versions(self, name: AdapterName) -> list[StoredVersion]:
        """The versions that an adapter can be rolled back to, the one published last first."""
        return self._store.versions(name)

    def scratch(self) -> AbstractContextManager[Path]:
        """A folder for an upload, gone afterwards; StorageError for an OSError inside."""
        return self._store.scratch()

    def publish(
        self,
        name: AdapterName,
        path: Path,
        *,
        must_be_new: bool | None = None,
        expected: str | None = None,
    ) -> Published:
        """Read and check the adapter at path, store it, and let the name stand for it.

        must_be_new  True raises AdapterExistsError if the name is taken, False
                     ModelNotFoundError if it is not, None takes either
        expected     the version that it must replace, else VersionMismatchError

        Raises AdapterInvalidError, PinsFullError and StorageError as well; whatever it raises, the
        name stands for what it stood for.
        """
        check_name(name.name, self._layout.name, name.owner)
        check_expected(name, self._published.get(name), must_be_new, expected)
        adapter, staged = self._read(name, path)
        summary = summarise(adapter)
        with self._changing:
            previous = self._published.get(name)
            check_expected(name, previous, must_be_new, expected)
            published = self._put(name, adapter, staged, summary, previous)
        # Whoever uploads is about to ask; of a whole folder few are asked.
        self._cache.prefetch(published.version, is_reserved=False)
        return published

    def publish_folder(self, folder: str, path: Path, fingerprint: str) -> Published | None:
        """Publish the watched folder of that name, unless it holds what was last published from it.

        None if it does: only its fingerprint is noted, so that what was uploaded, rolled back or
        deleted since then stays so. Raises AdapterExistsError if the name was uploaded, else as
        `publish` does.
        """
        name = AdapterName(None, folder)
        check_name(folder, self._layout.name)
        check_not_uploaded(name, self._published.get(name))
        adapter, staged = self._read(name, path)
        summary = summarise(adapter)
        with self._changing:
            previous = self._published.get(name)
            check_not_uploaded(name, previous)
            try:
                if self._store.renew_folder(folder, adapter, summary, fingerprint):
                    return None
            finally:
                self._has_changed.set()  # files of a version that no name has may be back
            return self._put(name, adapter, staged, summary, previous, fingerprint)

    def remove(self, name: AdapterName, *, expected: str | None = None) -> None:
        """Forget a name and its versions; requests that run end on theirs.

        Raises ModelNotFoundError, VersionMismatchError, StorageError.
        """
        with self._changing:
            published = self.find(name)
            check_expected(name, published, None, expected)
            self._store.remove(name)
            self._drop(published)

    def set_pinned(self, name: AdapterName, is_pinned: bool) -> Published:
        """Keep an adapter on the device, whatever its version, or no longer.

        Raises ModelNotFoundError, PinsFullError, StorageError.
        """
        with self._changing:
            published = self.find(name)
            num_bytes = 0
            if is_pinned:
                num_bytes = self._bytes_to_pin(name, self._cache.adapter(published.version))
            self._store.set_pinned(name, is_pinned)
            if published.is_pinned == is_pinned:  # as far as is known here: see _pin_again
                return published
            changed = replace(published, is_pinned=is_pinned)
            with self._lock:
                self._published[name] = changed
            if is_pinned:
                self._pinned_bytes[name] = num_bytes
                self._cache.pin(published.version)
            else:
                del self._pinned_bytes[name]
                self._cache.unpin(published.version)
            return changed

    def roll_back(
        self, name: AdapterName, version: str | None = None, *, expected: str | None = None
    ) -> Published:
        """Let the name stand for an earlier version again.

        version  a digest, or its first 8 or more characters; None is the one published before
                 the present one

        Raises ModelNotFoundError, VersionMismatchError, InvalidRequestError for a version that
        there is not, PinsFullError, StorageError.
        """
        with self._changing:
            published = self.find(name)
            check_expected(name, published, None, expected)
            digest = choose_version(self._store.versions(name), published.version.digest, version)
            # What cannot be read is not rolled back to.
            adapter = replace(self._store.read(digest), name=name.text)
            staged = self._stage(adapter)
            num_bytes = self._bytes_to_pin(name, adapter) if published.is_pinned else 0
            self._store.roll_back(name, digest)
            new = replace(published, version=_version(name, digest), summary=summarise(adapter))
            self._cache.admit(new.version, staged)
            self._switch(published, new, num_bytes)
        self._cache.prefetch(new.version, is_reserved=False)
        return new

    def folders(self) -> dict[str, str]:
        """Fingerprints of the watched folders that were published, by name."""
        return self._store.folders()

    def forget_folder(self, folder: str) -> None:
        """A watched folder is gone, and so is the adapter that it made, if it is there still.

        Raises StorageError.
        """
        with self._changing:
            self._store.forget_folder(folder)
            published = self._published.get(AdapterName(None, folder))
            if published is not None and published.is_from_folder:
                self._drop(published)

    def _find(self, names: Sequence[AdapterName]) -> Published:
        for name in names:
            if published := self._published.get(name):
                return published
        shown = repr(names[0].name) if names else "of that name"
        raise ModelNotFoundError(f"there is no adapter {shown}", param="name")

    def _read(self, name: AdapterName, path: Path) -> tuple[Adapter, StagedAdapter]:
        """An adapter that can be served, and as the pool takes it."""
        try:
            adapter = read_adapter(path, self._layout, name=name.text)
            return adapter, self._stage(adapter)
        except AdapterInvalidError as error:
            previous = self._published.get(name)
            if previous is None:
                raise
            raise AdapterInvalidError(
                f"{error.message}\nVersion {previous.version.digest[:12]} of {name.text!r} is "
                "still being served.",
                param=error.param,
            ) from None

    def _stage(self, adapter: Adapter) -> StagedAdapter:
        """The adapter as the pool takes it; AdapterInvalidError if that could not hold it."""
        self._pool.check(adapter)  # before memory is taken for it
        return self._pool.stage(adapter, self._layout)

    def _put(
        self,
        name: AdapterName,
        adapter: Adapter,
        staged: StagedAdapter,
        summary: AdapterSummary,
        previous: Published | None,
        fingerprint: str | None = None,
    ) -> Published:
        """Store what was checked, and let the name stand for it."""
        version = _version(name, adapter.digest)
        is_pinned = previous is not None and previous.is_pinned
        pinned_bytes = self._bytes_to_pin(name, adapter) if is_pinned else 0
        try:
            created_at = self._store.publish(
                name, adapter, summary, keep_versions=self._keep_versions, fingerprint=fingerprint
            )
        except StorageError:
            self._has_changed.set()  # it may have moved files in before the registry refused
            raise
        self._cache.admit(version, staged)
        is_from_folder = fingerprint is not None
        if previous is not None:
            is_from_folder = previous.is_from_folder
        published = Published(name, version, summary, is_pinned, is_from_folder, created_at)
        self._switch(previous, published, pinned_bytes)
        return published

    def _switch(self, previous: Published | None, new: Published, pinned_bytes: int) -> None:
        """Let requests find the new version, and let go of the previous one."""
        if new.is_pinned:
            self._pinned_bytes[new.name] = pinned_bytes
            self._cache.pin(new.version)
        with self._lock:
            self._published[new.name] = new
        if previous is not None:
            self._let_go(previous)

    def _drop(self, published: Published) -> None:
        """Let requests no longer find a name."""
        with self._lock:
            del self._published[published.name]
        self._let_go(published)

    def _let_go(self, published: Published) -> None:
        if published.is_pinned:
            self._cache.unpin(published.version)
            if published.name not in self._published:
                del self._pinned_bytes[published.name]
        self._cache.dismiss(published.version)
        self._has_changed.set()

    def _bytes_to_pin(self, name: AdapterName, adapter: Adapter) -> int:
        """Device memory of the adapter; PinsFullError if it may not be pinned beside the others."""
        num_bytes = self._pool.num_bytes_for(adapter)
        others = sum(of for other, of in self._pinned_bytes.items() if other != name)
        others += self._pool.pinned_bytes  # of an adapter that is merged
        if others + num_bytes > (limit := int(self._pool.arena.nbytes * _MOST_PINNED)):
            raise PinsFullError(
                f"adapter {name.name!r} takes {num_bytes} bytes of device memory, and with it more "
                f"than the {limit} that may be pinned would be; unpin another, or raise "
                "--adapter-memory"
            )
        return num_bytes

    def _pin_again(self, name: AdapterName, version: AdapterVersion) -> None:
        """Pin what was pinned before the restart; what no longer can be is told, and served."""
        try:
            self._pinned_bytes[name] = self._bytes_to_pin(name, self._cache.adapter(version))
        except ServeError as error:
            logger.error("adapter %s is not pinned: %s", name.text, error.message)
            self._published[name] = replace(self._published[name], is_pinned=False)
        else:
            self._cache.pin(version)

    def _collect(self) -> None:
        """The collector's thread: delete the files that no name and no request needs any more."""
        while not self._is_closed.is_set():
            self._has_changed.wait()
            self._is_closed.wait(_COLLECT_SECONDS)
            self._has_changed.clear()
            try:
                with self._changing:
                    needed = self._cache.digests()
                    num_files, num_bytes, num_spared = self._store.collect(needed)
            except (ServeError, OSError) as error:
                logger.warning("files that no adapter needs could not be deleted: %s", error)
                self._is_closed.wait(_RETRY_SECONDS)
                self._has_changed.set()
                continue
            if num_files:
                logger.info("deleted %d files of %d bytes in the store", num_files, num_bytes)
            if num_spared:
                self._has_changed.set()


def _version(name: AdapterName, digest: str) -> AdapterVersion:
    return AdapterVersion(name.text, digest, name.owner)
