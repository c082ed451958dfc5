"""The watched folder: a subfolder that appears, changes or goes is an adapter that does."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from watchfiles import watch

from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.errors import AdapterExistsError, PinsFullError, ServeError, StorageError

logger = logging.getLogger(__name__)

# A folder is read when it has not changed for so long. One that cannot be served then may be half
# written still: it is tried once more before that is told. One that is gone may come back at once.
_SETTLE_SECONDS = 0.5
_PATIENCE_SECONDS = 4.0
_GONE_SECONDS = 1.0

# After so long a folder is tried again whose adapter could not be stored, or whose name is taken.
_DELAY_SECONDS = 30.0

# How often changes are looked at while some are unsettled, and how often everything is, for file
# systems that do not tell of changes.
_GLANCE_MILLISECONDS = 200
_LOOK_SECONDS = 10.0


@dataclass(slots=True)
class _Change:
    """A subfolder that is not published as it is now."""

    fingerprint: str
    since: float  # time.monotonic() at which it was first seen like this
    was_tried: bool = False


class AdapterFolder:
    """Publishes the subfolders of one folder, each under its name, as they are and as they change.

    Those whose name begins with '.' or '_' are passed over. What was published of a folder is kept
    in the registry's store, so a folder that is half overwritten harms no request.
    """

    def __init__(self, path: Path, registry: AdapterRegistry) -> None:
        """Nothing is read before `publish_all` or `start`."""
        self.path = path.resolve()
        self._registry = registry
        self._known = registry.folders()  # fingerprints of what was published, by name
        self._refused: dict[str, str] = {}  # of what cannot be, and was told
        self._delayed: dict[str, str] = {}  # of what cannot be yet, and was told
        self._changes: dict[str, _Change] = {}
        self._is_stopped = Event()
        self._thread = Thread(target=self._watch, name="adapter-folder", daemon=True)

    def names(self) -> list[str]:
        """Of all subfolders that are to be adapters, ascending."""
        found = (path for path in self.path.iterdir() if path.name[0] not in "._")
        return sorted(path.name for path in found if path.is_dir() or path.is_symlink())

    def publish_all(self, track: Callable[[list[str]], Iterable[str]] = iter) -> None:
        """Publish every subfolder that changed since the last run, and remove what is gone.

        `track` goes through the names, and may show how far it is.
        """
        names = self.names()
        for name in track(names):
            self.publish(name)
        for name in self._known.keys() - set(names):
            self._remove(name)

    def publish(self, name: str) -> None:
        """Publish one subfolder if it changed; why it cannot be served is logged, once."""
        fingerprint = _fingerprint(self.path / name)
        if fingerprint not in (self._known.get(name), self._refused.get(name)):
            self._try(name, fingerprint, is_last=True)

    def start(self) -> None:
        """Watch the folder from now on, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._is_stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        looked_at = 0.0
        for paths in self._events():
            try:
                if time.monotonic() - looked_at > _LOOK_SECONDS:
                    looked_at = time.monotonic()
                    self._note(self._known.keys() | set(self.names()))
                else:
                    names = (path.relative_to(self.path).parts[0] for path in paths)
                    self._note({*names, *self._changes})
                self._settle()
            except OSError as error:  # and what is published stays as it is
                logger.error("the adapters folder %s cannot be read: %s", self.path, error.strerror)

    def _events(self) -> Iterator[list[Path]]:
        """What changed below the folder; often nothing, so that what is unsettled is looked at."""
        try:
            for changes in watch(
                self.path,
                stop_event=self._is_stopped,
                debounce=_GLANCE_MILLISECONDS,
                step=_GLANCE_MILLISECONDS // 4,
                rust_timeout=_GLANCE_MILLISECONDS,
                yield_on_timeout=True,
                raise_interrupt=False,
            ):
                paths = (Path(path) for _, path in changes)
                yield [path for path in paths if path != self.path]
        except OSError as error:  # such as too few inotify watches
            logger.warning(
                "changes below %s are seen only every %g seconds: it cannot be watched: %s",
                self.path,
                _LOOK_SECONDS,
                error,
            )
        while not self._is_stopped.wait(_GLANCE_MILLISECONDS / 1000):
            yield []

    def _note(self, names: Iterable[str]) -> None:
        """Take down which of these are not as they were published."""
        for name in names:
            if name[0] in "._":
                continue
            fingerprint = _fingerprint(self.path / name)
            if fingerprint in (self._known.get(name, ""), self._refused.get(name)):
                self._changes.pop(name, None)
                continue
            change = self._changes.get(name)
            if change is None or change.fingerprint != fingerprint:
                self._changes[name] = _Change(fingerprint, time.monotonic())

    def _settle(self) -> None:
        """Publish or remove what has not changed for a while."""
        for name, change in list(self._changes.items()):
            age = time.monotonic() - change.since
            if not change.fingerprint:
                if age >= _GONE_SECONDS and self._remove(name):
                    del self._changes[name]
            elif age >= (_PATIENCE_SECONDS if change.was_tried else _SETTLE_SECONDS):
                if self._try(name, change.fingerprint, is_last=change.was_tried):
                    del self._changes[name]
                change.was_tried = True

    def _try(self, name: str, fingerprint: str, *, is_last: bool) -> bool:
        """Publish a subfolder; False if that failed and is to be tried again."""
        path = self.path / name
        try:
            published = self._registry.publish_folder(name, path, fingerprint)
        except (StorageError, AdapterExistsError, PinsFullError) as error:
            # It may be served later though the folder stays as it is.
            if self._delayed.get(name) != fingerprint:
                logger.error("%s is not served as it is now: %s", path, error.message)
            self._delayed[name] = fingerprint
            self._changes[name] = _Change(fingerprint, time.monotonic() + _DELAY_SECONDS)
            return False
        except ServeError as error:
            if is_last:
                logger.error("%s is not served as it is now: %s", path, error.message)
                self._refused[name] = fingerprint
            return is_last
        except Exception:  # whatever it was, the other folders are served, and watched on
            logger.exception("%s is not served as it is now: a bug", path)
            self._refused[name] = fingerprint
            return True
        self._known[name] = fingerprint
        self._refused.pop(name, None)
        if published is None:  # the files are others, what they hold is not
            return True
        logger.info(
            "adapter %s: version %s, %s, rank %s, %d bytes (%d as plain LoRA)",
            name,
            published.version.digest[:12],
            published.summary.sharing,
            "/".join(map(str, published.summary.ranks)),
            published.summary.stored_bytes,
            published.summary.expanded_bytes,
        )
        return True

    def _remove(self, name: str) -> bool:
        """Forget a subfolder that is gone; False if that failed and is to be tried again."""
        try:
            self._registry.forget_folder(name)
        except StorageError as error:
            logger.error(
                "adapter %s is still served: its folder is gone, but %s", name, error.message
            )
            self._changes[name] = _Change("", time.monotonic() + _DELAY_SECONDS)
            return False
        self._known.pop(name, None)
        self._refused.pop(name, None)
        logger.info("adapter %s: its folder is gone", name)
        return True


def _fingerprint(folder: Path) -> str:
    """A text that changes whenever a file in the folder does; empty when there is no folder."""
    if not folder.is_dir() and not folder.is_symlink():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        try:
            status = path.stat()
        except OSError:  # it went meanwhile, or is a link that leads nowhere: nothing to read
            continue
        text = f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
        digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()
