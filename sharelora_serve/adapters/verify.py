"""Check a store from its bytes up, without changing anything."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from sharelora_serve.adapters.database import connect, registry_in
from sharelora_serve.adapters.factor_files import FactorFiles, Manifest
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.errors import ConfigurationError, StorageError


def verify_store(folder: Path, on_content: Callable[[int, int], None]) -> list[str]:
    """Check every digest of a store, which a server may have open, and return what is wrong.

    on_content(done, total) is called after each version. Changes nothing. Raises
    ConfigurationError if there is no store in the folder.
    """
    if not registry_in(folder).is_file():
        raise ConfigurationError(f"store = {str(folder)!r}: there is no store in that folder")
    files = FactorFiles(folder)
    problems: list[str] = []
    try:
        with closing(connect(folder, is_read_only=True)) as database:
            for problem in _problems(database, files, on_content):
                problems.append(problem)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of damage in a message
        problems.append(f"registry: {error}")
    return problems + files.damaged()


def _problems(
    database: sqlite3.Connection, files: FactorFiles, on_content: Callable[[int, int], None]
) -> Iterator[str]:
    """What is wrong with a registry and its versions."""
    for (finding,) in database.execute("PRAGMA integrity_check").fetchall():
        if finding != "ok":
            yield f"registry: {finding}"
    contents = database.execute("SELECT digest, manifest FROM contents").fetchall()
    for index, (digest, manifest) in enumerate(contents):
        try:
            files.read(digest, Manifest.from_json(manifest))
        except StorageError as error:
            names = database.execute(
                "SELECT owner, name FROM versions JOIN adapters ON id = adapter "
                "WHERE digest = ? ORDER BY owner, name",
                (digest,),
            ).fetchall()
            if names or _is_there(database, digest):  # else it was collected meanwhile
                used_by = ", ".join(AdapterName(o or None, n).text for o, n in names)
                yield f"{error.message} (version of: {used_by or 'no adapter'})"
        on_content(index + 1, len(contents))


def _is_there(database: sqlite3.Connection, digest: str) -> bool:
    query = "SELECT 1 FROM contents WHERE digest = ?"
    return database.execute(query, (digest,)).fetchone() is not None
