"""Unpack what a tenant uploaded, an adapter's file or an archive of its folder, or say why not.

Whoever wrote the upload may have meant harm. Only files with the names of an adapter's are
written, below one folder; what is read, kept in memory and written is bounded whatever an archive
promises.
"""

import errno
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, BinaryIO

from sharelora_serve.adapters.adapter_files import (
    CONFIG_FILE,
    MLX_FILE,
    PEFT_FILE,
    are_refused_weights,
)
from sharelora_serve.adapters.naming import shown
from sharelora_serve.errors import AdapterInvalidError, RequestTooLargeError

_CHUNK_BYTES = 64 * 1024
_TAR_BLOCK_BYTES = 16 * 1024  # read ahead by tarfile

_MAX_MEMBERS = 200  # a training checkpoint has twenty
_MAX_NAME_LENGTH = 1000  # characters of a member's name
_MAX_PART_BYTES = 255  # of a folder's or a file's own name, as in every file system
_MAX_DEPTH = 16  # parts of a name
_MAX_DEPTH_READ = 3  # an archived folder, PEFT's folder of the adapter's name, the file itself
_MAX_DIRECTORY_BYTES = 256 * 1024  # of a .zip
_MAX_HEADER_BYTES = 160 * 1024  # of a .tar: half a KiB or more for each member
_MAX_EXTENDED_HEADER_BYTES = 2 * 1024  # before 3.11.10, Python takes the square of it in time

_MIN_HEADER_BYTES = 30  # of a .zip's member
_ENCRYPTED = 0x41  # the flags of a .zip's member for its two kinds of encryption
_EXTENDED_HEADERS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)

# zipfile and tarfile raise more on damaged archives than they document.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    ValueError,
)

_SEND = "send a .safetensors file, or a .zip or .tar.gz of the adapter's folder"
_PACK_AGAIN = "pack the adapter's folder again"


def unpack(upload: BinaryIO, folder: Path, *, max_bytes: int) -> Path:
    """Write the adapter in `upload` below `folder`, and return the path to give to read_adapter.

    upload is seekable and holds a .safetensors file, or a .zip or .tar.gz of an adapter's folder
    or of what is in it; which one is told from its content. folder exists and is empty. At most
    max_bytes are written; of a .tar.gz not many more are inflated, what is not needed included.
    Weights that cannot be
    read, such as pickles, become empty files of their names, so that read_adapter can name them.

    Raises AdapterInvalidError with the reason and the way out, OSError when files cannot be read
    or written. What was written until then stays below `folder`.
    """
    upload.seek(0)
    head = upload.read(9)
    upload.seek(0)
    what = "the upload"
    target = _Target(folder / "upload", max_bytes)
    try:
        # A header begins with its length and "{", which neither archive has there.
        if head[8:] == b"{":
            what = "the .safetensors file"
            path = folder / "upload.safetensors"
            target.write(path, upload)
            return path
        if head.startswith(b"PK\3\4"):
            what = "the .zip"
            _unpack_zip(upload, target)
        elif head.startswith(b"\x1f\x8b"):
            what = "the .tar.gz"
            _unpack_tar(upload, target, max_bytes)
        else:
            raise AdapterInvalidError(f"it {_what_starts_with(head)}; {_SEND}")
        return target.adapter_folder()
    except AdapterInvalidError as error:
        reason = error.message
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to before the beginning, which an archive asks for
            raise
        reason = f"it is damaged; {_PACK_AGAIN}"
    except _DAMAGE as error:
        reason = f"it is damaged ({shown(str(error))}); {_PACK_AGAIN}"
    raise AdapterInvalidError(f"{what} cannot be taken: {reason}", param="file")


def _what_starts_with(head: bytes) -> str:
    if not head:
        return "is empty"
    if head.startswith(b"\x80"):
        return (
            "is a pickle, which could run code and is never opened: "
            "save the adapter with safe_serialization=True"
        )
    return "is neither a whole .safetensors file nor a .zip nor a .tar.gz"


class _Target:
    """Where an adapter's files are written while the members of its archive are gone through."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_members = 0
        self._files: set[tuple[str, ...]] = set()
        self._folders: set[tuple[str, ...]] = set()

    def place(self, name: str, *, is_folder: bool) -> Path | None:
        """Where to write the content of a member; None when it is not needed.

        Raises AdapterInvalidError for a member that no folder of an adapter has.
        """
        self._num_members += 1
        if self._num_members > _MAX_MEMBERS:
            raise AdapterInvalidError(
                f"it has more than {_MAX_MEMBERS} members; pack only {CONFIG_FILE} and {PEFT_FILE}"
            )
        parts = _parts(name)
        folders = {parts[:length] for length in range(1, len(parts) + is_folder)}
        self._folders |= folders
        if not is_folder:
            if parts in self._files:
                raise _refused(name, "stands there twice")
            self._files.add(parts)
        if self._folders & self._files or (not is_folder and name.rpartition("/")[2] in ("", ".")):
            raise _refused(name, "is both a file and a folder")
        if is_folder:
            return None
        file = parts[-1]
        if file == "data.pkl":
            raise AdapterInvalidError(
                "it is a pickle of torch.save, which could run code and is never opened; save the "
                f"adapter with safe_serialization=True and {_SEND}"
            )
        if len(parts) > _MAX_DEPTH_READ or file.startswith("._"):  # what macOS adds to each file
            return None
        path = self._root.joinpath(*parts)
        if file in (CONFIG_FILE, PEFT_FILE, MLX_FILE):
            return path
        if are_refused_weights(file):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return None

    def write(self, path: Path, content: IO[bytes]) -> int:
        """Write `content` to a new file, and return the number of its bytes.

        Raises RequestTooLargeError when more than max_bytes would be written in all.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        num_bytes = 0
        with path.open("xb") as file:
            while chunk := content.read(_CHUNK_BYTES):
                num_bytes += len(chunk)
                self._num_bytes += len(chunk)
                if self._num_bytes > self._max_bytes:
                    raise _too_large(self._max_bytes)
                file.write(chunk)
        return num_bytes

    def adapter_folder(self) -> Path:
        """The folder that was archived: the only one at the top, or the top itself.

        Raises AdapterInvalidError when there was no configuration.
        """
        if not any(
            parts[-1] == CONFIG_FILE and len(parts) <= _MAX_DEPTH_READ for parts in self._files
        ):
            raise AdapterInvalidError(
                f"it has no {CONFIG_FILE}, or too many folders around it; pack the folder that "
                f"holds {CONFIG_FILE} and {PEFT_FILE}"
            )
        top = list(self._root.iterdir())
        return top[0] if len(top) == 1 and top[0].is_dir() else self._root


def _parts(name: str) -> tuple[str, ...]:
    """The folders and the file that a member's name stands for; () for the archive's top.

    Raises AdapterInvalidError for a name that could mean something else elsewhere, or be written
    outside of its folder.
    """
    if not name:
        raise _refused(name, "is no name")
    if len(name) > _MAX_NAME_LENGTH:
        raise _refused(name, f"is longer than {_MAX_NAME_LENGTH} characters")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise _refused(name, "is not UTF-8")
    if not name.isprintable():
        raise _refused(name, "has characters that cannot be shown")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts:
        raise _refused(name, "leads out of the archive's folder")
    if "\\" in name or (name[1:2] == ":" and name[0].isalpha()):
        raise _refused(name, "is a path of Windows; names here have '/' between folders")
    if len(parts) > _MAX_DEPTH:
        raise _refused(name, f"has more than {_MAX_DEPTH} folders")
    if any(len(part.encode()) > _MAX_PART_BYTES for part in parts):
        raise _refused(name, f"has a part of more than {_MAX_PART_BYTES} bytes")
    return parts


def _refused(name: str, reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"its member {shown(repr(name))} {reason}; {_PACK_AGAIN}")


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the adapter unpacks to more than {max_bytes} bytes, the most this server accepts; pack "
        f"only {CONFIG_FILE} and {PEFT_FILE}, or raise --max-adapter-bytes",
        param="file",
    )


class _SmallReads:
    """A file for zipfile, which would read and parse a directory of any length at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, or, for the end of the archive, all that are left."""
        if size > _MAX_DIRECTORY_BYTES:
            raise AdapterInvalidError(
                f"its directory has more than {_MAX_DIRECTORY_BYTES} bytes; pack only "
                f"{CONFIG_FILE} and {PEFT_FILE}"
            )
        return self._file.read(size)


def _unpack_zip(upload: BinaryIO, target: _Target) -> None:
    try:
        archive = zipfile.ZipFile(_SmallReads(upload), metadata_encoding="utf-8")
    except UnicodeDecodeError:
        raise AdapterInvalidError(f"a member's name is not UTF-8; {_PACK_AGAIN}") from None
    with archive:
        members = archive.infolist()
        # zipfile looks for the directory from the end, and takes anything before and after it.
        end_bytes = 22 + len(archive.comment)
        upload.seek(-end_bytes, 2)
        end = upload.read(end_bytes)
        if not end.startswith(b"PK\5\6") or int.from_bytes(end[20:22], "little") != end_bytes - 22:
            raise AdapterInvalidError(f"something follows its end, or that is cut; {_PACK_AGAIN}")
        members.sort(key=lambda member: member.header_offset)
        if members and members[0].header_offset != 0:
            raise AdapterInvalidError(f"something stands before its first member; {_PACK_AGAIN}")
        ends_at = [*(member.header_offset for member in members[1:]), archive.start_dir]
        for member, end_at in zip(members, ends_at, strict=False):
            name = member.orig_filename
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(name, "is a link or a device, and only files are taken")
            if member.flag_bits & _ENCRYPTED:
                raise _refused(name, "is encrypted")
            if member.header_offset + _MIN_HEADER_BYTES + member.compress_size > end_at:
                raise _refused(name, "reaches into the next")
            is_folder = name.endswith("/")
            if kind and stat.S_ISDIR(kind) != is_folder:
                raise _refused(name, "is both a file and a folder")
            path = target.place(name, is_folder=is_folder)
            if path is None:
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _refused(name, "is compressed by a method other than deflate")
            with archive.open(member) as content:
                num_bytes = target.write(path, content)
            if num_bytes != member.file_size:
                raise _refused(name, f"has {num_bytes} bytes and promises {member.file_size}")


class _TarMember(tarfile.TarInfo):
    """A header of a .tar, refused before tarfile reads what belongs to it into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarMember":
        """As tarfile's own, which also raises what is no AdapterInvalidError."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in _EXTENDED_HEADERS and member.size > _MAX_EXTENDED_HEADER_BYTES:
            raise AdapterInvalidError(
                f"a member's name and attributes take more than {_MAX_EXTENDED_HEADER_BYTES} "
                f"bytes; {_PACK_AGAIN}, without extended attributes"
            )
        return member


class _Inflated:
    """What a gzip file holds, from its beginning and only as far as allowed.

    tarfile's own mode `r|gz` checks no checksum, takes headers of any length a byte at a time, and
    inflates a block at once whatever comes out of it.

    allowed      bytes that may be read in all; to ask for more raises AdapterInvalidError
    num_bytes    bytes read
    content_end  the position after the last byte that is not zero
    """

    def __init__(self, upload: BinaryIO) -> None:
        self.allowed = 0
        self.num_bytes = 0
        self.content_end = 0
        self._upload = upload
        self._inflate = zlib.decompressobj(wbits=31)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end, which must be the upload's end too."""
        data = b""
        while not data and not self._inflate.eof:
            compressed = self._inflate.unconsumed_tail or self._upload.read(_TAR_BLOCK_BYTES)
            data = self._inflate.decompress(compressed, size)
            if not data and not compressed:
                raise AdapterInvalidError("it is cut short; send it again")
        if not data and (self._inflate.unused_data or self._upload.read(1)):
            raise AdapterInvalidError(f"something follows its end; {_PACK_AGAIN}")
        self.num_bytes += len(data)
        if self.num_bytes > self.allowed:
            raise AdapterInvalidError(
                f"its headers have more than {_MAX_HEADER_BYTES} bytes, or more than that follows "
                f"its last member; pack only {CONFIG_FILE} and {PEFT_FILE}"
            )
        if content := data.rstrip(b"\0"):
            self.content_end = self.num_bytes - len(data) + len(content)
        return data


def _unpack_tar(upload: BinaryIO, target: _Target, max_bytes: int) -> None:
    stream = _Inflated(upload)
    stream.allowed = _MAX_HEADER_BYTES + _TAR_BLOCK_BYTES
    with tarfile.open(
        fileobj=stream,  # type: ignore[call-overload]  # only read() is used of it
        mode="r|",
        bufsize=_TAR_BLOCK_BYTES,
        tarinfo=_TarMember,
        encoding="utf-8",
    ) as archive:
        while (member := archive.next()) is not None:
            if archive.offset > max_bytes:
                raise _too_large(max_bytes)
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise _refused(member.name, "is a link, a device or sparse; only files are taken")
            if member.isreg():  # a folder's size says nothing
                stream.allowed += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.size < 0:
                raise _refused(member.name, "has less than no bytes")
            path = target.place(member.name, is_folder=member.isdir())
            if path is not None:
                content = archive.extractfile(member)
                assert content is not None, "a regular file has content"
                target.write(path, content)
        # tarfile stops at a header that is damaged as it does at the zeros that end an archive.
        while archive.fileobj.read(_TAR_BLOCK_BYTES):
            pass
        if stream.content_end > archive.offset:
            raise AdapterInvalidError(
                f"a member is damaged, or something follows the last; {_PACK_AGAIN}"
            )
        if stream.num_bytes < archive.offset + tarfile.BLOCKSIZE:
            raise AdapterInvalidError("it is cut short; send it again")
