"""API keys: the file that holds their hashes, and whom the key of a request stands for."""

import asyncio
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from filelock import FileLock
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from sharelora_serve.adapters.naming import NAME_RULE, is_name
from sharelora_serve.errors import AuthenticationError, ConfigurationError
from sharelora_serve.server.caller import Caller

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""How long a change of the file may go unnoticed."""

LOCK_SECONDS = 10.0
"""How long a command waits for another one that changes the same file."""

_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)


class StoredKey(BaseModel):
    """What is kept of one key, a line of the file.

    id          what it is called when it is listed and revoked
    sha256      of the whole key, in hexadecimal. A key has 256 random bits, which nobody can guess:
                a slow hash, as for passwords, would only slow down every request
    role        an admin may do everything, a tenant what Caller says
    tenant      the tenant's name; None for an admin
    created_at  with its time zone
    comment     for whoever reads the list
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[0-9a-z]{1,32}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    role: Literal["admin", "tenant"]
    tenant: str | None = None
    created_at: AwareDatetime
    comment: str | None = None

    @field_validator("comment")
    @classmethod
    def _comment_is_printable(cls, comment: str | None) -> str | None:
        if comment is not None and not comment.isprintable():
            raise ValueError("should be one line of printable text")
        return comment

    @model_validator(mode="after")
    def _role_and_tenant_agree(self) -> Self:
        if self.role == "admin" and self.tenant is not None:
            raise ValueError("an admin's key has no tenant")
        if self.role == "tenant" and (self.tenant is None or not is_name(self.tenant)):
            raise ValueError(f"a tenant's key needs the tenant's name: {NAME_RULE}")
        return self

    @property
    def owner(self) -> str:
        """Whose it is, as messages and tables say it."""
        return "an admin" if self.tenant is None else f"tenant {self.tenant}"


class KeyFile:
    """The keys of a running server, which follow their file. Used on the event loop alone.

    A file that is changed is read within CHECK_SECONDS. One that is broken or gone by then is
    logged once, and the keys known before stay valid until it is whole again. One that cannot be
    read is tried again at every look: its state need not change as the system recovers.
    """

    def __init__(self, path: Path) -> None:
        """Read the keys. Raises ConfigurationError if the file is not one of keys."""
        self._path = path
        self._checked_at = time.monotonic()
        self._state = _file_state(path)
        self._callers = _read_callers(path)  # by the hashes of their keys
        self._unreadable: str | None = None  # why, if the last try to read it failed
        self._following = asyncio.Lock()

    async def follow(self) -> None:
        """Read the file again if it has changed; looks at it at most once in CHECK_SECONDS."""
        is_recent = time.monotonic() - self._checked_at < CHECK_SECONDS
        if is_recent or self._following.locked():
            return
        async with self._following:
            self._checked_at = time.monotonic()
            # Taken before reading: of a change in between, the next look will tell.
            state = _file_state(self._path)
            if state == self._state:
                self._unreadable = None
                return
            try:
                # Thousands of keys take a while, in which streams go on.
                self._callers = await asyncio.to_thread(_read_callers, self._path)
            except ConfigurationError as error:
                is_unreadable = isinstance(error.__cause__, OSError)
                if not is_unreadable or error.message != self._unreadable:
                    logger.error("the API keys known before stay valid: %s", error.message)
                if is_unreadable:
                    self._unreadable = error.message
                    return
            # Only now: the client whose request this is may have left while it was read.
            self._state, self._unreadable = state, None

    def authenticate(self, header: str | None) -> Caller:
        """Whom an `Authorization` header stands for; AuthenticationError if for nobody."""
        matched = _BEARER.fullmatch(header or "")
        if matched is None:
            raise AuthenticationError(
                "This server needs an API key: send it as 'Authorization: Bearer KEY'. Whoever "
                "runs the server makes one with 'sharelora-serve keys create'."
            )
        # How long the look-up takes may depend on hashes that are alike, which nobody can bring
        # about: a key has 256 random bits, and a guess whose hash begins as another's tells no key.
        caller = self._callers.get(_hash(matched[1]))
        if caller is None:
            raise AuthenticationError(
                "Incorrect API key provided: it is unknown to this server, or has been revoked. "
                "Ask whoever runs the server for a new one."
            )
        return caller


def _read_callers(path: Path) -> dict[str, Caller]:
    """Whom the keys of a file stand for, by their hashes; what is odd about it is logged."""
    keys = read_keys(path)
    state = _file_state(path)
    if state is not None and state.mode & (stat.S_IRGRP | stat.S_IROTH):
        mode = stat.S_IMODE(state.mode)
        logger.warning(
            "%s can be read by others than its owner (mode %o); chmod 600 it", path, mode
        )
    if keys:
        logger.info("%d API keys are valid, of %s", len(keys), path)
    else:
        logger.warning("%s holds no API keys: every request is refused", path)
    return {key.sha256: Caller(key.tenant) for key in keys}


def read_keys(path: Path) -> list[StoredKey]:
    """The keys of a file in its order; blank lines are skipped.

    Raises ConfigurationError that names every bad line. What stands in a line is not shown: it may
    be a key that somebody put there as it is.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is no file of API keys: it is not UTF-8") from None
    except OSError as error:
        raise ConfigurationError(
            f"the file of API keys {path} cannot be read: {error.strerror}"
        ) from error
    keys, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            keys.append(StoredKey.model_validate(json.loads(line, object_pairs_hook=_fields)))
        except ValidationError as error:
            problems += [f"line {number}: {_problem(item)}" for item in error.errors()]
        except (ValueError, RecursionError):
            problems.append(f"line {number}: should be one JSON object, each field once")
    for what in ("id", "sha256"):
        counts = Counter(getattr(key, what) for key in keys)
        if len(counts) < len(keys):
            problems.append(f"two keys have the same {what}")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigurationError(
            f"{path} is no file of API keys: {len(problems)} "
            f"problem{'s' * (len(problems) > 1)}{listed}\n"
            "Correct or remove what is named; 'sharelora-serve keys create' makes keys."
        )
    return keys


def create_key(path: Path, tenant: str | None, comment: str | None) -> tuple[StoredKey, str]:
    """Add a key of the tenant, or of an admin where that is None, and return it with its text.

    The text is nowhere else: the file, which is made if it is not there, has only its hash. Raises
    ConfigurationError if the name or the comment cannot be one, or the file cannot be used.
    """
    key_id = secrets.token_hex(6)
    text = f"slk_{key_id}_{secrets.token_urlsafe(32)}"
    try:
        key = StoredKey(
            id=key_id,
            sha256=_hash(text),
            role="admin" if tenant is None else "tenant",
            tenant=tenant,
            created_at=datetime.now(UTC).replace(microsecond=0),
            comment=comment,
        )
    except ValidationError as error:
        problems = "\n".join(_problem(item) for item in error.errors())
        raise ConfigurationError(f"no key was made: {problems}") from None
    with _changing(path) as keys:
        keys.append(key)
    return key, text


def revoke_key(path: Path, key_id: str) -> StoredKey:
    """Remove a key by its id and return it.

    Raises ConfigurationError if there is none of that id or the file cannot be used.
    """
    with _changing(path) as keys:
        revoked = next((key for key in keys if key.id == key_id), None)
        if revoked is None:  # the id is not repeated: somebody may have given the key itself
            raise ConfigurationError(
                f"{path} holds no key of that id; 'sharelora-serve keys list' shows the ids"
            )
        keys.remove(revoked)
    return revoked


@contextmanager
def _changing(path: Path) -> Iterator[list[StoredKey]]:
    """The keys of a file, written back as the block leaves them unless it raises."""
    path = path.resolve()  # what a link leads to is replaced, not the link
    if not path.parent.is_dir():  # the lock would make it, with everybody's permissions
        raise ConfigurationError(f"there is no folder {path.parent} for the file of API keys")
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        keys = read_keys(path) if path.exists() else []
        yield keys
        _write(path, keys)


def _write(path: Path, keys: Sequence[StoredKey]) -> None:
    """Replace the file as a whole: whoever reads it, whenever the system fails, sees old or new."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 600
    temporary = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            if path.exists():  # root may change the file of the user who runs the server
                os.chown(temporary, path.stat().st_uid, -1)
            file.writelines(key.model_dump_json(exclude_none=True) + "\n" for key in keys)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


class _FileState(NamedTuple):
    """What changes with a file; changed_at is its ctime in nanoseconds.

    mtime would not do: it can be set back, and does not tell of permissions that were mended.
    """

    mode: int
    changed_at: int
    num_bytes: int
    inode: int


def _file_state(path: Path) -> _FileState | None:
    """None while the file is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _FileState(status.st_mode, status.st_ctime_ns, status.st_size, status.st_ino)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python's parser would keep the last of fields of one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is there twice")
    return fields


def _problem(item: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    """One of pydantic's findings without the value that is at fault."""
    message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if item["type"] == "extra_forbidden":
        return f"has a field that there is not; there are {', '.join(StoredKey.model_fields)}"
    return ": ".join([*map(str, item["loc"]), message])
