"""The registry's tables, and a connection to the file that holds them."""

import sqlite3
from pathlib import Path

VERSION = 2
"""Of the tables. 1 had no digests of folders; `migrate` adds them."""

SCHEMA = f"""
CREATE TABLE base (name TEXT NOT NULL, layout TEXT NOT NULL);
CREATE TABLE contents (
    digest TEXT PRIMARY KEY,
    manifest TEXT NOT NULL,
    summary TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE content_files (
    digest TEXT NOT NULL REFERENCES contents ON DELETE CASCADE,
    file TEXT NOT NULL,
    PRIMARY KEY (digest, file)
) WITHOUT ROWID;
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,  -- '' is nobody's: public
    name TEXT NOT NULL,
    current TEXT NOT NULL REFERENCES contents,
    is_pinned INTEGER NOT NULL DEFAULT 0,
    is_from_folder INTEGER NOT NULL,  -- created by the watched folder, and goes with it
    created_at REAL NOT NULL,
    UNIQUE (owner, name)
);
CREATE TABLE versions (
    adapter INTEGER NOT NULL REFERENCES adapters ON DELETE CASCADE,
    digest TEXT NOT NULL REFERENCES contents,
    number INTEGER NOT NULL,  -- grows with every publication of the adapter
    published_at REAL NOT NULL,
    PRIMARY KEY (adapter, digest)
) WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);
CREATE TABLE folders (
    name TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    digest TEXT  -- of what was last published from the folder; NULL if VERSION was 1 then
) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
"""


def migrate(database: sqlite3.Connection) -> None:
    """Make tables of version 1 those of VERSION, in the transaction that is open."""
    database.execute("ALTER TABLE folders ADD COLUMN digest TEXT")
    database.execute(f"PRAGMA user_version = {VERSION}")


def registry_in(folder: Path) -> Path:
    """The registry's file in a store."""
    return folder / "registry.sqlite3"


def connect(folder: Path, *, is_read_only: bool = False) -> sqlite3.Connection:
    """A connection to a store's registry."""
    database = sqlite3.connect(
        f"{registry_in(folder).resolve().as_uri()}?mode={'ro' if is_read_only else 'rwc'}",
        uri=True,
        timeout=30.0,
        isolation_level=None,
        check_same_thread=False,
    )
    if not is_read_only:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
    return database
