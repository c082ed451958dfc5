"""What one name stands for, whether that may change, and which of its versions is meant."""

from collections.abc import Sequence
from dataclasses import dataclass

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.store import StoredVersion
from sharelora_serve.adapters.summary import AdapterSummary
from sharelora_serve.errors import (
    AdapterExistsError,
    InvalidRequestError,
    ModelNotFoundError,
    VersionMismatchError,
)

_FEWEST_DIGEST_CHARACTERS = 8  # that a version may be called by


@dataclass(frozen=True, slots=True)
class Published:
    """What one name stands for now; `created_at` in Unix seconds."""

    name: AdapterName
    version: AdapterVersion
    summary: AdapterSummary
    is_pinned: bool
    is_from_folder: bool
    created_at: float


def check_not_uploaded(name: AdapterName, published: Published | None) -> None:
    """Raise AdapterExistsError if a watched folder's name stands for what was uploaded."""
    if published is not None and not published.is_from_folder:
        raise AdapterExistsError(
            f"an adapter {name.name!r} was uploaded already; delete that one, or rename the folder"
        )


def check_expected(
    name: AdapterName, published: Published | None, must_be_new: bool | None, expected: str | None
) -> None:
    """Raise unless a name stands for what its change expects; see AdapterRegistry.publish."""
    if must_be_new and published is not None:
        raise AdapterExistsError(
            f"there is an adapter {name.name!r} already; publish a new version of it with "
            f"PUT /v1/adapters/{name.name}, or choose another name",
            param="name",
        )
    if must_be_new is False and published is None:
        raise ModelNotFoundError(
            f"there is no adapter {name.name!r}; create it with POST /v1/adapters",
            param="name",
        )
    present = None if published is None else published.version.digest
    if expected is not None and expected != present:
        now = "there is none" if present is None else f"it is at {present}"
        raise VersionMismatchError(
            f"adapter {name.name!r} is not at version {expected[:64]}: {now}; look at what was "
            "published meanwhile, then send the present version in If-Match"
        )


def choose_version(versions: Sequence[StoredVersion], present: str, wanted: str | None) -> str:
    """The digest to roll back to: the one that `wanted` begins, or the one before the present.

    Raises InvalidRequestError if there is none, or more than one.
    """
    digests = [version.digest for version in versions]
    if wanted is None:
        earlier = digests[digests.index(present) + 1 :]
        if not earlier:
            raise InvalidRequestError(
                "there is no version before the present one to roll back to", param="version"
            )
        return earlier[0]
    found = [digest for digest in digests if digest.startswith(wanted.lower())]
    if len(found) != 1 or len(wanted) < _FEWEST_DIGEST_CHARACTERS:
        raise InvalidRequestError(
            f"version: {wanted[:64]!r} is not one of this adapter's {len(digests)} versions; give "
            f"one of {', '.join(digest[:12] for digest in digests)}",
            param="version",
        )
    return found[0]
