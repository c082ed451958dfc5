"""An adapter on this machine as the one file that is uploaded."""

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sharelora_serve.adapters.adapter_files import CONFIG_FILE, find_files
from sharelora_serve.errors import AdapterInvalidError


class Package(NamedTuple):
    """What is uploaded: the name of a file, its content and how many bytes that has."""

    file_name: str
    content: BinaryIO
    num_bytes: int


@contextmanager
def open_package(path: Path) -> Iterator[Package]:
    """The file at `path`, or the adapter in the folder at `path` as a .zip in a temporary file.

    Of a folder only the configuration and the weights are packed. Raises AdapterInvalidError if it
    has not one of either, OSError if something cannot be read or written.
    """
    if path.is_dir():
        with tempfile.TemporaryFile() as file:
            _pack(path, file)
            num_bytes = file.tell()
            file.seek(0)
            yield Package(f"{path.resolve().name}.zip", file, num_bytes)
    else:
        with path.open("rb") as file:
            yield Package(path.name, file, path.stat().st_size)


def _pack(folder: Path, file: BinaryIO) -> None:
    try:
        config_text, weights_path = find_files(folder)
    except AdapterInvalidError as error:
        raise AdapterInvalidError(f"{folder} cannot be uploaded: it {error.message}") from None
    assert config_text is not None, "a folder has a configuration, or find_files raises"
    # Stored as it is, since weights hardly get smaller. Files may be older than a .zip's calendar.
    with zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:
        archive.writestr(CONFIG_FILE, config_text)
        archive.write(weights_path, weights_path.name)
