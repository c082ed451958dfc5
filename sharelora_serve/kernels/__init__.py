"""What the decoder layers are computed with: products, norms, attention, shrink and expand."""

import hashlib
import os
from pathlib import Path

import numba

_SOURCES = sorted(Path(__file__).parent.glob("*.py"))


def _use_cache() -> None:
    """Keep what numba compiles in the user's cache folder, one folder for each state of the source.

    numba itself asks only whether the file of the outermost function changed, and would go on
    using what it compiled from an older version of the files that this one calls.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()
    folder = cache / "sharelora-serve" / "kernels" / digest[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # numba then looks for a place itself
    numba.config.CACHE_DIR = str(folder)


if not numba.config.CACHE_DIR:  # NUMBA_CACHE_DIR
    _use_cache()
