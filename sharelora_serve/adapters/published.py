"""What one name stands for, and which of its versions is meant."""

from collections.abc import Sequence
from dataclasses import dataclass

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.store import StoredVersion
from sharelora_serve.adapters.summary import AdapterSummary
from sharelora_serve.errors import InvalidRequestError

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
