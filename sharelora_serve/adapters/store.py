"""The durable registry: names, versions, owners and pins in SQLite, factors in files beside it.

    registry.sqlite3   what names stand for; in WAL mode, every commit synced to disk
    factors/           one file for the distinct factors of a module and side, named by the sha256
                       of its bytes, so that versions and tenants with a common A share it
    incoming/          files on their way into factors/; emptied when the store is opened
    lock               held by the one server that may write

A publication writes and syncs its files first and then moves the name in one transaction: it is
there whole or not at all, whenever the process or the machine stops.
"""

import errno
import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from os.path import samestat
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.database import SCHEMA, VERSION, connect, migrate, registry_in
from sharelora_serve.adapters.factor_files import FactorFiles, Manifest, not_written
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.summary import AdapterSummary
from sharelora_serve.errors import ConfigurationError, StorageError


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One version that an adapter can be rolled back to; `published_at` in Unix seconds."""

    digest: str
    published_at: float


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One name and what it stands for; `created_at` in Unix seconds."""

    name: AdapterName
    digest: str
    summary: AdapterSummary
    is_pinned: bool
    is_from_folder: bool
    created_at: float


class AdapterStore:
    """One base's adapters on disk. Every call may block on the disk; all are thread-safe.

    What fails because of the disk raises StorageError and changes nothing.
    """

    def __init__(self, folder: Path, layout: BaseLayout) -> None:
        """Open or make the store in `folder` for one base.

        Raises ConfigurationError if another server has it open, if it holds adapters of another
        base, or if it cannot be opened.
        """
        self._folder = folder
        self._layout = layout
        # A connection each, so that a load never waits for another's commit to be synced.
        self._lock, self._reading_lock = Lock(), Lock()
        self._is_closed = False  # written while both are held
        # Not of this thread alone: the one that closes the store may be another.
        self._owner = FileLock(folder / "lock", timeout=0, thread_local=False)
        try:
            with ExitStack() as undo:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._owner.acquire()
                undo.callback(self._owner.release)
                self._files = FactorFiles(folder)
                self._files.clear_incoming()
                self._database = connect(folder)
                undo.callback(self._database.close)
                self._prepare()
                self._reader = connect(folder, is_read_only=True)
                undo.callback(self._reader.close)
                self._opened = registry_in(folder).stat()
                undo.pop_all()
        except Timeout:
            raise ConfigurationError(
                f"store = {str(folder)!r}: another server has it open; stop that one, or give "
                "this one a folder of its own"
            ) from None
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(
                f"store = {str(folder)!r}: cannot be opened: {error}; it should be a folder that "
                "may be read and written"
            ) from None

    def close(self) -> None:
        """Let another server open the store."""
        with self._lock, self._reading_lock:
            self._is_closed = True
            self._reader.close()
            self._database.close()
        self._owner.release()

    def adapters(self) -> list[StoredAdapter]:
        """Every name and what it stands for, by owner and name."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT owner, name, current, summary, is_pinned, is_from_folder, created_at "
                "FROM adapters "
                "JOIN contents ON digest = current ORDER BY owner, name"
            ).fetchall()
        return [
            StoredAdapter(
                AdapterName(owner or None, name),
                digest,
                AdapterSummary.from_json(summary),
                bool(is_pinned),
                bool(is_from_folder),
                created_at,
            )
            for owner, name, digest, summary, is_pinned, is_from_folder, created_at in rows
        ]

    def versions(self, name: AdapterName) -> list[StoredVersion]:
        """All versions of an adapter, the one published last first; empty for no adapter."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT digest, published_at FROM versions JOIN adapters ON id = adapter "
                "WHERE owner = ? AND name = ? ORDER BY number DESC",
                _key(name),
            ).fetchall()
        return [StoredVersion(*row) for row in rows]

    def publish(
        self,
        name: AdapterName,
        adapter: Adapter,
        summary: AdapterSummary,
        *,
        keep_versions: int,
        fingerprint: str | None = None,
    ) -> float:
        """Let the name stand for an adapter, new or not; return when the name was created.

        keep_versions  older versions of the name than so many are forgotten
        fingerprint    of the watched folder of that name, if it was read from there
        """
        with self._files.incoming(adapter) as incoming, self._writing() as database:
            now = time.time()
            _put_content(database, adapter.digest, incoming.move_in(), summary)
            identity, created_at = database.execute(
                "INSERT INTO adapters (owner, name, current, is_from_folder, created_at) "
                "VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET current = excluded.current RETURNING id, created_at",
                (*_key(name), adapter.digest, fingerprint is not None, now),
            ).fetchone()
            database.execute(
                "INSERT OR REPLACE INTO versions SELECT ?, ?, 1 + coalesce(max(number), 0), ? "
                "FROM versions WHERE adapter = ?",
                (identity, adapter.digest, now, identity),
            )
            database.execute(
                "DELETE FROM versions WHERE adapter = ?1 AND digest NOT IN "
                "(SELECT digest FROM versions WHERE adapter = ?1 ORDER BY number DESC LIMIT ?2)",
                (identity, keep_versions),
            )
            if fingerprint is not None:
                database.execute(
                    "INSERT OR REPLACE INTO folders VALUES (?, ?, ?)",
                    (name.name, fingerprint, adapter.digest),
                )
        return float(created_at)

    def scratch(self) -> AbstractContextManager[Path]:
        """A folder for an upload, gone afterwards; StorageError for an OSError inside."""
        return self._files.scratch()

    def remove(self, name: AdapterName) -> None:
        """Forget a name and all its versions."""
        with self._writing() as database:
            database.execute("DELETE FROM adapters WHERE owner = ? AND name = ?", _key(name))

    def set_pinned(self, name: AdapterName, is_pinned: bool) -> None:
        """Remember whether an adapter stays on the device."""
        with self._writing() as database:
            database.execute(
                "UPDATE adapters SET is_pinned = ? WHERE owner = ? AND name = ?",
                (is_pinned, *_key(name)),
            )

    def roll_back(self, name: AdapterName, digest: str) -> None:
        """Let the name stand for one of its `versions`."""
        with self._writing() as database:
            database.execute(
                "UPDATE adapters SET current = ? WHERE owner = ? AND name = ?",
                (digest, *_key(name)),
            )

    def folders(self) -> dict[str, str]:
        """Fingerprints of the watched folders whose content was published, by name."""
        with self._reading() as database:
            return dict(database.execute("SELECT name, fingerprint FROM folders").fetchall())

    def renew_folder(
        self, name: str, adapter: Adapter, summary: AdapterSummary, fingerprint: str
    ) -> bool:
        """Note a watched folder's fingerprint if it holds what was last published from it.

        No name is moved, but damaged files of that version are mended, as `publish` does; those of
        one that no name has are there until `collect`. False, and nothing done, if it holds
        something else.
        """
        with self._reading() as database:
            row = database.execute("SELECT digest FROM folders WHERE name = ?", (name,)).fetchone()
        if row is None or row[0] != adapter.digest:
            return False
        with self._files.incoming(adapter) as incoming, self._writing() as database:
            _put_content(database, adapter.digest, incoming.move_in(), summary)
            database.execute(
                "UPDATE folders SET fingerprint = ? WHERE name = ?", (fingerprint, name)
            )
        return True

    def forget_folder(self, name: str) -> None:
        """The watched folder of that name is gone, and so is the adapter that it made."""
        with self._writing() as database:
            database.execute("DELETE FROM folders WHERE name = ?", (name,))
            database.execute(
                "DELETE FROM adapters WHERE owner = '' AND name = ? AND is_from_folder", (name,)
            )

    def read(self, digest: str) -> Adapter:
        """The factors of a version, checked against its digest.

        Raises StorageError when it is not there, not readable or damaged.
        """
        with self._reading() as database:
            row = database.execute(
                "SELECT manifest FROM contents WHERE digest = ?", (digest,)
            ).fetchone()
        if row is None:
            raise StorageError(f"version {digest[:12]} is not in the store; publish it again")
        return self._files.read(digest, Manifest.from_json(row[0]))

    def collect(self, needed: Collection[str]) -> tuple[int, int, int]:
        """Delete what no name needs: files, their bytes, and versions without a name spared.

        needed  digests of versions that requests may still read. No publication may be under way.
        """
        with self._writing() as database:
            # A write even if nothing is to go: a commit that failed when it was synced is still in
            # the log. Unless it is overwritten, a kill brings it back, then without its files.
            database.execute(f"PRAGMA user_version = {VERSION}")
            unnamed = database.execute(
                "SELECT digest FROM contents WHERE digest NOT IN (SELECT digest FROM versions)"
            ).fetchall()
            gone = [(digest,) for (digest,) in unnamed if digest not in needed]
            database.executemany("DELETE FROM contents WHERE digest = ?", gone)
            files = {row[0] for row in database.execute("SELECT DISTINCT file FROM content_files")}
        # After the commit: a file that is gone although a committed row needs it would be a loss,
        # one that is there although no row needs it is found the next time.
        return *self._files.delete_all_but(files), len(unnamed) - len(gone)

    def _prepare(self) -> None:
        """Make the tables, or check that they are of this base and bring them to this version."""
        database, layout = self._database, _layout_text(self._layout)
        database.execute("BEGIN IMMEDIATE")  # refused if the registry may only be read
        found = database.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            for statement in SCHEMA.split(";\n"):
                database.execute(statement)
            database.execute("INSERT INTO base VALUES (?, ?)", (self._layout.name, layout))
        elif found == 1:
            migrate(database)
        elif found != VERSION:
            raise ConfigurationError(
                f"store = {str(self._folder)!r}: was written by a newer version of this server; "
                "run that one, or give another folder"
            )
        name, stored_layout = database.execute("SELECT name, layout FROM base").fetchone()
        if (name, stored_layout) != (self._layout.name, layout):
            raise ConfigurationError(
                f"store = {str(self._folder)!r}: holds adapters of base {name!r}, not of "
                f"{self._layout.name!r}; serve that base, or give this one a folder of its own"
            )
        database.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._reading_lock:
            self._check_open()
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise StorageError(f"the store's registry cannot be read: {error}") from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is on disk when the block is left, or undone if it raises."""
        with self._lock:
            self._check_open()
            try:
                self._database.execute("BEGIN IMMEDIATE")
                # SQLite would go on writing to a file that was deleted.
                if not samestat(registry_in(self._folder).stat(), self._opened):
                    raise OSError(errno.ESTALE, "its folder was replaced while it was open")
                yield self._database
                self._database.execute("COMMIT")
            except BaseException as error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error | OSError):
                    raise not_written(error) from None
                raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise StorageError("the store is closed, since the server is stopping; ask again later")


def _key(name: AdapterName) -> tuple[str, str]:
    return name.owner or "", name.name


def _put_content(
    database: sqlite3.Connection, digest: str, manifest: Manifest, summary: AdapterSummary
) -> None:
    """Write down where a version's factors are, over what is there: that mends damage."""
    database.execute(
        "INSERT INTO contents VALUES (?, ?, ?) ON CONFLICT DO UPDATE "
        "SET manifest = excluded.manifest, summary = excluded.summary",
        (digest, manifest.to_json(), summary.to_json()),
    )
    database.executemany(
        "INSERT OR IGNORE INTO content_files VALUES (?, ?)",
        [(digest, file) for file in manifest.files],
    )


def _layout_text(layout: BaseLayout) -> str:
    shapes: Sequence[str] = [f"{module} {shape}" for module, shape in layout.shapes.items()]
    return f"{layout.num_layers} layers of " + ", ".join(shapes)
