"""The files of an adapter: which ones a path stands for, and their contents, never unpickled."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import safetensors

from sharelora_serve.adapters.json_object import MAX_CONFIG_BYTES, parse_json_object
from sharelora_serve.adapters.naming import shown
from sharelora_serve.errors import AdapterInvalidError

CONFIG_FILE = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"
MLX_FILE = "adapters.safetensors"

METADATA_KEY = "adapter_config"
"""Where a single .safetensors file carries the text of its adapter_config.json."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PARTS = "adapter_model-*.safetensors"

# Parsed, a header takes some twenty times its length in memory. 126 layers with all modules have
# 1764 tensors and a header of 0.3 MB; the configuration may stand in it too.
_MAX_HEADER_BYTES = 8 * MAX_CONFIG_BYTES
_MAX_TENSORS = 10_000


class AdapterFiles(NamedTuple):
    """What a path was found to stand for; config_text is None for a single .safetensors file."""

    config_text: bytes | None
    weights_path: Path


class StoredTensor(NamedTuple):
    """A tensor as a safetensors file holds it; nothing is known but that shape and data agree.

    shape  of any number of dimensions, each of any size if another is 0
    dtype  the safetensors name of its type, such as F32
    data   its bytes, row by row
    """

    shape: tuple[int, ...]
    dtype: str
    data: bytearray


class Weights(NamedTuple):
    """A safetensors file in memory.

    tensors         key -> tensor, in sorted order
    metadata        the header's own key-value texts
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def find_files(path: Path) -> AdapterFiles:
    """The configuration and weights that `path`, a folder or a .safetensors file, stands for.

    Raises AdapterInvalidError when they are missing, ambiguous or pickled, OSError when they
    cannot be read.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterInvalidError(
                "is not a .safetensors file; save the adapter with safe_serialization=True "
                "(pickles can run code and are never opened)"
            )
        return AdapterFiles(None, path)
    if not path.is_dir():
        raise AdapterInvalidError("is neither a file nor a folder")
    folder = path if (path / CONFIG_FILE).is_file() else _folder_inside(path)
    config_path = folder / CONFIG_FILE
    if config_path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    return AdapterFiles(config_path.read_bytes(), _weights_in(folder))


def read_weights(path: Path) -> Weights:
    """Every tensor of a safetensors file, copied out of it.

    The file is read once and whole: mapped into memory, a file cut short by its owner while in
    use would kill the process.

    Raises AdapterInvalidError when it is damaged, OSError when it cannot be read.
    """
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    if _MAX_HEADER_BYTES < header_bytes <= len(data):
        raise AdapterInvalidError(
            f"has a header of {header_bytes} bytes, and {_MAX_HEADER_BYTES} are read at most; "
            "save the adapter's own tensors only"
        )
    try:
        # Checks every size and offset.
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise AdapterInvalidError(
            f"is not a whole safetensors file ({shown(str(error))}); copy or save it again"
        ) from None
    if len(entries) > _MAX_TENSORS:
        raise AdapterInvalidError(
            f"has {len(entries)} tensors, and {_MAX_TENSORS} are read at most; "
            "save the adapter's own tensors only"
        )
    header = parse_json_object(data[8 : 8 + header_bytes])
    tensors = {
        key: StoredTensor(tuple(entry["shape"]), entry["dtype"], entry["data"])
        for key, entry in sorted(entries, key=lambda item: item[0])
    }
    return Weights(tensors, header.get("__metadata__") or {})


def are_refused_weights(file: str) -> bool:
    """Whether find_files refuses weights by this name of a file: pickles, and parts of weights."""
    return any(fnmatchcase(file, pattern) for pattern in (*_PICKLES, _PARTS))


def _folder_inside(path: Path) -> Path:
    """PEFT saves an adapter not called "default" in a folder of its name."""
    inside = sorted(config.parent for config in path.glob(f"*/{CONFIG_FILE}"))
    if len(inside) == 1:
        return inside[0]
    if not inside:
        raise AdapterInvalidError(f"has no {CONFIG_FILE}, nor has one folder inside it")
    names = ", ".join(shown(folder.name) for folder in inside[:10])
    raise AdapterInvalidError(f"holds {len(inside)} adapters ({names}); give one of the folders")


def _weights_in(folder: Path) -> Path:
    found = [folder / file for file in (PEFT_FILE, MLX_FILE) if (folder / file).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterInvalidError(
            f"has both {PEFT_FILE} and {MLX_FILE}; keep the one that {CONFIG_FILE} belongs to"
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise AdapterInvalidError(
            f"holds the pickle {shown(pickles[0])}, which could run code and is never opened; "
            "save the adapter with safe_serialization=True"
        )
    parts = sorted(file.name for file in folder.glob(_PARTS))
    if parts:
        raise AdapterInvalidError(
            f"holds its weights in parts ({shown(parts[0])}, ...); save them as one {PEFT_FILE}"
        )
    raise AdapterInvalidError(f"has {CONFIG_FILE} but no {PEFT_FILE}")
