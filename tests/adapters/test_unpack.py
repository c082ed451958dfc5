"""Uploads: every form of an adapter is unpacked, everything else refused, and nothing is harmed."""

import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.unpack import unpack
from sharelora_serve.errors import AdapterInvalidError, RequestTooLargeError
from tests.adapters.hostile import MAX_BYTES, hostile_uploads, tarred, zipped
from tests.adapters.samples import (
    LAYOUT,
    Config,
    Tensors,
    compact_tensors,
    mlx_tensors,
    peft_config,
    peft_tensors,
    random_adapter,
    read,
    write_folder,
)

PATIENCE_SECONDS = 5.0  # far above what any takes on an idle machine
Pack = Callable[[Path], bytes]


def unpacked(upload: bytes, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return unpack(io.BytesIO(upload), folder, max_bytes=MAX_BYTES)


def read_upload(upload: bytes, folder: Path) -> Adapter:
    path = unpacked(upload, folder)
    assert path.is_relative_to(folder)
    return read(path)


def refusal_of(upload: bytes, folder: Path) -> str:
    with pytest.raises((AdapterInvalidError, RequestTooLargeError)) as caught:
        read_upload(upload, folder)
    assert caught.value.param == "file"
    return caught.value.message


def files_below(folder: Path) -> list[Path]:
    return [Path(top) / name for top, _, names in os.walk(folder) for name in names]


def zip_of_contents(folder: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file.getvalue()


def zip_of_folder(folder: Path) -> bytes:
    name = shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    return Path(name).read_bytes()


class Pipe(io.BytesIO):
    """Something that cannot seek: sizes and checksums then stand behind the contents."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise OSError("a pipe")

    tell = seek


def zip_that_was_streamed(folder: Path) -> bytes:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files_below(folder):
            with archive.open(str(path.relative_to(folder)), "w", force_zip64=True) as member:
                member.write(path.read_bytes())
    return pipe.getvalue()


def zip_of_macos(folder: Path) -> bytes:
    members = [(".DS_Store", b"\0\0\0\1Bud1"), ("__MACOSX/._acme", b"\0\5\x16\7")]
    for path in folder.rglob("*"):
        if path.is_file():
            name = f"{folder.name}/{path.relative_to(folder)}"
            apple = f"__MACOSX/{Path(name).parent}/._{path.name}"
            members += [(name, path.read_bytes()), (apple, b"\0\5\x16\7")]
    return zipped(members)


def packed_by(command: str) -> Pack:
    """By a program that runs beside a folder called acme and writes the archive to its output."""

    def pack(folder: Path) -> bytes:
        assert folder.name == "acme"
        done = subprocess.run(command.split(), cwd=folder.parent, check=True, capture_output=True)
        return done.stdout

    return pack


def tar_of_python(folder: Path) -> bytes:
    return Path(shutil.make_archive(str(folder), "gztar", folder.parent, folder.name)).read_bytes()


PACKS = [
    zip_of_contents,
    zip_of_folder,
    zip_that_was_streamed,
    zip_of_macos,
    tar_of_python,
    packed_by("tar -czf - acme"),
    packed_by("tar --format=ustar -czf - -C acme ."),
    packed_by("tar --format=posix -czf - acme/."),
    packed_by("tar --format=v7 -czf - ./acme"),
]


def forms(seed: int) -> dict[str, tuple[Adapter, Config, Tensors, str]]:
    """Adapter, configuration, tensors and their file of every form that is read."""
    plain, shared = random_adapter(seed), random_adapter(seed + 1, "AB")
    peft, mlx = "adapter_model.safetensors", "adapters.safetensors"
    compact = peft_config(shared, peft_type="SHARELORA", share="AB")
    of_mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
    return {
        "PEFT": (plain, peft_config(plain), peft_tensors(plain), peft),
        "compact": (shared, compact, compact_tensors(shared, "AB"), peft),
        "MLX": (plain, of_mlx, mlx_tensors(plain), mlx),
    }


@pytest.mark.parametrize("form", ["PEFT", "compact", "MLX"])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("inside", [False, True])
def test_an_archive_reads_as_the_folder_that_was_packed(
    form: str, pack: Pack, inside: bool, tmp_path: Path, seed: int
) -> None:
    adapter, config, tensors, file = forms(seed)[form]
    # PEFT saves an adapter that has a name in a folder of that name.
    write_folder(tmp_path / "acme" / ("named" if inside else ""), config, tensors, file)
    upload = pack(tmp_path / "acme")
    assert read_upload(upload, tmp_path / "new").digest == adapter.digest


@pytest.mark.parametrize("form", ["PEFT", "compact", "MLX"])
def test_one_file_reads_as_the_folder_it_was_made_of(form: str, tmp_path: Path, seed: int) -> None:
    adapter, config, tensors, _ = forms(seed)[form]
    upload = save(tensors, metadata={"format": "pt", "adapter_config": json.dumps(config)})
    assert read_upload(upload, tmp_path / "new").digest == adapter.digest


@pytest.mark.parametrize("pack", PACKS)
def test_of_a_training_checkpoint_only_the_adapter_is_written(
    pack: Pack, tmp_path: Path, seed: int
) -> None:
    adapter, config, tensors, file = forms(seed)["PEFT"]
    folder = write_folder(tmp_path / "acme", config, tensors, file)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(random.Random(seed).randbytes(300_000))
    for name in ("README.md", "tokenizer.json", "vocab.json", "trainer_state.json", "Größe.txt"):
        (folder / name).write_text("{}" * 9000)
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"\x80")
    upload = pack(folder)
    assert read_upload(upload, tmp_path / "new").digest == adapter.digest
    written = {path.name: path.stat().st_size for path in files_below(tmp_path / "new")}
    assert written.pop(file) == (folder / file).stat().st_size
    assert written.pop("adapter_config.json") == (folder / "adapter_config.json").stat().st_size
    assert set(written.values()) <= {0}


@pytest.mark.parametrize("pack", PACKS)
def test_a_pickle_instead_of_weights_is_named_and_never_written(
    pack: Pack, tmp_path: Path, seed: int
) -> None:
    _, config, tensors, file = forms(seed)["PEFT"]
    folder = write_folder(tmp_path / "acme", config, tensors, file)
    (folder / file).rename(folder / "adapter_model.bin")
    message = refusal_of(pack(folder), tmp_path / "new")
    assert "holds the pickle adapter_model.bin" in message
    assert "safe_serialization=True" in message
    for path in files_below(tmp_path / "new"):
        assert path.name == "adapter_config.json" or not path.stat().st_size


def test_hostile_uploads_are_refused_with_a_reason_and_leave_nothing_behind(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a" / "b" / "c" / "new"
    kinds: set[str] = set()
    contents: set[bytes] = set()
    for kind, upload in hostile_uploads(LAYOUT, seed):
        started_at = time.monotonic()
        try:
            message = refusal_of(upload, folder)
        except BaseException as error:
            error.add_note(f"the upload is: {kind}")
            raise
        assert time.monotonic() - started_at < PATIENCE_SECONDS, kind
        assert message.replace("\n", "").isprintable(), kind
        assert 20 < len(message.encode()) < 8000, kind
        files = files_below(tmp_path)
        assert all(path.is_relative_to(folder) and path.is_file() for path in files), kind
        assert not any(path.is_symlink() for path in tmp_path.rglob("*")), kind
        assert sum(path.stat().st_size for path in files) <= MAX_BYTES, kind
        shutil.rmtree(folder)
        assert kind not in kinds
        kinds.add(kind)
        contents.add(upload)
    assert len(contents) > 800


def test_what_is_kept_in_memory_does_not_grow_with_what_an_archive_promises(
    tmp_path: Path, seed: int
) -> None:
    huge = re.compile("bomb|endless|of 5 MB|in a chain|9000 files|promises|take long|size of")
    uploads = [of for of in hostile_uploads(LAYOUT, seed) if huge.search(of[0])]
    assert len(uploads) > 30
    tracemalloc.start()
    try:
        for number, (kind, upload) in enumerate(uploads):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            with suppress(AdapterInvalidError, RequestTooLargeError):
                unpacked(upload, tmp_path / str(number))
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < 2 * 1024 * 1024, kind
    finally:
        tracemalloc.stop()


def test_no_more_is_written_than_allowed(tmp_path: Path, seed: int) -> None:
    _, config, tensors, file = forms(seed)["PEFT"]
    folder = write_folder(tmp_path / "acme", config, tensors, file)
    num_bytes = sum(path.stat().st_size for path in files_below(folder))
    whole = (folder / file).read_bytes()
    for number, (upload, smallest) in enumerate(
        [(zip_of_contents(folder), num_bytes), (whole, len(whole))]
    ):
        fits, short = tmp_path / f"fits {number}", tmp_path / f"short {number}"
        fits.mkdir()
        short.mkdir()
        unpack(io.BytesIO(upload), fits, max_bytes=smallest)
        with pytest.raises(RequestTooLargeError, match=f"more than {smallest - 1} bytes"):
            unpack(io.BytesIO(upload), short, max_bytes=smallest - 1)
        assert sum(path.stat().st_size for path in files_below(short)) < smallest


def test_a_disk_that_cannot_be_written_is_not_the_uploads_fault(tmp_path: Path, seed: int) -> None:
    _, config, tensors, file = forms(seed)["PEFT"]
    folder = write_folder(tmp_path / "acme", config, tensors, file)
    for upload in (zip_of_contents(folder), tar_of_python(folder), (folder / file).read_bytes()):
        with pytest.raises(OSError, match=r"File exists|Not a directory"):
            unpack(io.BytesIO(upload), folder / file, max_bytes=MAX_BYTES)


@cache
def good_uploads(seed: int) -> list[bytes]:
    """A small adapter in every container."""
    adapter = random_adapter(seed, modules=("self_attn.q_proj",), layers=(0,), rank=1)
    config = json.dumps(peft_config(adapter))
    tensors = peft_tensors(adapter)
    members = [
        ("acme/adapter_config.json", config.encode()),
        ("acme/adapter_model.safetensors", save(tensors)),
        ("acme/optimizer.pt", b"\x80" * 99),
    ]
    return [
        save(tensors, metadata={"adapter_config": config}),
        zipped(members),
        zipped(members, zipfile.ZIP_STORED),
        tarred(members),
        tarred(members, tarfile.GNU_FORMAT, level=0),
    ]


@st.composite
def spoilt(draw: st.DrawFn, seed: int) -> bytes:
    """A good upload with bytes changed, cut out, put in or taken from another place or upload."""
    uploads = good_uploads(seed)
    upload = bytearray(draw(st.sampled_from(uploads)))
    compressed = upload[:2] == b"\x1f\x8b" and draw(st.booleans())
    if compressed:  # what is inside, or the checksum tells at once
        upload = bytearray(gzip.decompress(upload))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(upload)))
        length = draw(st.integers(0, 40) | st.integers(0, len(upload)))
        other = draw(st.sampled_from(uploads))
        begin = draw(st.integers(0, len(other)))
        new = draw(
            st.sampled_from([b"", upload[begin : begin + length], other[begin : begin + length]])
            | st.binary(max_size=12)
            | st.sampled_from(
                [b"\0" * 8, b"\xff" * 8, b"-", b"{", b"[", b'"', b"PK\5\6", b"9" * 11]
            )
        )
        upload[at : at + draw(st.sampled_from([0, len(new), length]))] = new
    return gzip.compress(upload, 1) if compressed else bytes(upload)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_upload_is_refused_or_reads_as_some_adapter(
    seed: int, data: st.DataObject
) -> None:
    upload = data.draw(spoilt(seed))
    with TemporaryDirectory() as folder, suppress(AdapterInvalidError, RequestTooLargeError):
        assert read_upload(upload, Path(folder) / "new").pairs
