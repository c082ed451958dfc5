"""Uploads that mean harm, or that no server should take: some hundreds, of every kind known."""

import gzip
import io
import json
import math
import pickle
import random
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from sharelora_serve.adapters.layout import BaseLayout
from tests.adapters.hostile_weights import Weights, hostile_weights

MAX_BYTES = 8 * 1024 * 1024
"""What unpack may write: the bombs among the uploads are larger."""

Upload = tuple[str, bytes]
Config = dict[str, Any]
Member = tuple[str, bytes]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

BAD_NAMES = (
    "../adapter_config.json", "a/../../adapter_config.json", "..", "../", "a/..", "/etc/passwd",
    "//host/share/x", "/", "C:/adapter_config.json", "c:x", "\\\\host\\x", "..\\..\\x", "a\\b",
    "x\ny", "x\ry", "\x1b[2Jx", "x\x7f", "x\u202ey", "x\u0085", "x" * 300, "é" * 200, "x" * 5000,
    "a/" * 20 + "x", "../" * 300 + "x", "ab/" * 1500 + "x", "adapter_config.json/", "./../x",
    "./.", "acme/./../../x",
)  # fmt: skip


class _Good(NamedTuple):
    """An adapter that is taken, and of which each upload here spoils one thing."""

    config: Config
    weights: Weights
    rng: random.Random

    def members(self, **files: bytes) -> list[Member]:
        """The two files of its folder; files replaces `config` or `weights`."""
        config = files.get("config", json.dumps(self.config).encode())
        weights = files.get("weights", self.weights.file())
        return [(CONFIG_FILE, config), (WEIGHTS_FILE, weights)]

    def packed(self, **files: bytes) -> bytes:
        """As an archive of either kind."""
        pack = self.rng.choice([zipped, tarred])
        prefix = self.rng.choice(["", "acme/"])
        return pack([(prefix + name, content) for name, content in self.members(**files)])


def hostile_uploads(layout: BaseLayout, seed: int) -> Iterator[Upload]:
    """Kind and content of each upload: all must be refused by unpack or by read_adapter."""
    rng = random.Random(seed)
    weights = Weights.drawn(layout, rng)
    good = _Good({"peft_type": "LORA", "r": weights.rank, "lora_alpha": 8}, weights, rng)
    for make in (_no_adapter, _names, _zips, _tars, _folders, _configs):
        for kind, content in make(good):
            yield f"{make.__name__[1:]}: {kind}", content
    for kind, file in hostile_weights(layout, weights, rng):
        yield f"weights in an archive: {kind}", good.packed(weights=file)
    for kind, file in hostile_weights(layout, weights, rng, config=json.dumps(good.config)):
        yield f"one file: {kind}", file


def zipped(members: Iterable[Member], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # names that stand twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def tarred(
    members: Iterable[Member | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT, level: int = 1
) -> bytes:
    """members are names with contents, or headers without a content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return gzip.compress(file.getvalue(), level, mtime=0)


def _no_adapter(good: _Good) -> Iterator[Upload]:
    yield "empty", b""
    for size in (1, 8, 9, 1000):
        # The first byte keeps it from being an archive by chance, the ninth a file.
        yield f"{size} random bytes", (b"\xee" + good.rng.randbytes(size - 1)).replace(b"{", b"[")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"pickle {protocol}", pickle.dumps({"lora_A": [1.0] * 100, "f": print}, protocol)
    plain = gzip.decompress(tarred(good.members()))
    yield "tar that is not compressed", plain
    for kind, magic in (
        ("xz", b"\xfd7zXZ\0"), ("bzip2", b"BZh91AY&SY"), ("zstd", b"\x28\xb5\x2f\xfd"),
        ("7z", b"7z\xbc\xaf\x27\x1c"), ("rar", b"Rar!\x1a\7\1\0"), ("gguf", b"GGUF\3\0\0\0"),
        ("elf", b"\x7fELF\2\1\1"), ("hdf5", b"\x89HDF\r\n\x1a\n"), ("sqlite", b"SQLite format 3\0"),
        ("html", b"<!doctype html>"), ("script", b"#!/bin/sh\n"), ("json", b'{"peft_type":'),
        ("zip without members", b"PK\5\6" + bytes(18)), ("spanned zip", b"PK\7\x08PK\3\4"),
    ):  # fmt: skip
        yield kind, magic + bytes(64)
    for kind, content in (
        ("nothing", b""), ("text", b"hello" * 200), ("zeros", bytes(20_000)), ("gzip", None),
        ("zip", zipped(good.members())), ("safetensors", good.weights.file()),
    ):  # fmt: skip
        inner = gzip.compress(plain) if content is None else content
        yield f"gzip of {kind}", gzip.compress(inner)


def _names(good: _Good) -> Iterator[Upload]:
    for name in BAD_NAMES:
        kind, members = repr(name[:40]), [*good.members(), (name, b"{}")]
        yield f"zip, {kind} {len(name)}", zipped(members)
        yield f"tar, {kind} {len(name)}", tarred(members)
        yield f"gnu tar, {kind} {len(name)}", tarred(members, tarfile.GNU_FORMAT)
        yield f"zip with it first, {kind} {len(name)}", zipped(members[::-1])
    placeholder = zipped([*good.members(), ("PLACEHOLDER", b"x")])
    for name in (b"PLACE\0OLDER", b"\0LACEHOLDER", b"PLACE\xff\xfeLDER", b"PLACEHOLDE\xc3"):
        yield f"zip, {name!r}", placeholder.replace(b"PLACEHOLDER", name)
        with_flag = zipped([*good.members(), ("PLACEHOLD\u00e9", b"x")])
        yield f"zip in utf-8, {name!r}", with_flag.replace("PLACEHOLD\u00e9".encode(), name)
        text = name.decode(errors="surrogateescape")
        if "\0" not in text:
            yield f"tar, {name!r}", tarred([*good.members(), (text, b"x")], tarfile.GNU_FORMAT)
    for path in ("../x", "x\0y", "/x", "x" * 2000):
        info = tarfile.TarInfo("x")
        info.pax_headers = {"path": path}
        yield f"pax path {path[:9]!r}", tarred([*good.members(), info])


def _zips(good: _Good) -> Iterator[Upload]:
    members = good.members()
    whole = zipped(members)
    central = whole.index(b"PK\1\2")
    local, end = whole.index(b"PK\3\4"), whole.index(b"PK\5\6")

    def patched(at: int, form: str, value: int, content: bytes = whole) -> bytes:
        size = struct.calcsize(form)
        return content[:at] + struct.pack(form, value) + content[at + size :]

    for kind, mode in (
        ("symbolic link", stat.S_IFLNK), ("fifo", stat.S_IFIFO), ("socket", stat.S_IFSOCK),
        ("character device", stat.S_IFCHR), ("block device", stat.S_IFBLK), ("folder", stat.S_IFDIR)
    ):  # fmt: skip
        yield f"configuration is a {kind}", patched(central + 38, "<I", (mode | 0o777) << 16)
        link = zipfile.ZipInfo(good.rng.choice(["other", "a/b", "optimizer.pt"]))
        link.external_attr = (mode | 0o777) << 16
        file = io.BytesIO(whole)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(link, "/etc/passwd")
        yield f"another member is a {kind}", file.getvalue()
    for flag in (1, 0x20, 0x40, 0x41):
        yield f"flag {flag}", patched(central + 8, "<H", flag)
    for method in (1, 6, 9, 12, 14, 93, 95, 99):
        yield f"method {method}", patched(central + 10, "<H", method)
    yield "bzip2", zipped(members, zipfile.ZIP_BZIP2)
    yield "lzma", zipped(members, zipfile.ZIP_LZMA)
    yield "version", patched(central + 6, "<H", 999)
    for field, at, form in (
        ("checksum", 16, "<I"), ("packed size", 20, "<I"), ("size", 24, "<I"), ("name", 28, "<H"),
        ("extra", 30, "<H"), ("comment", 32, "<H"), ("offset", 42, "<I"),
    ):  # fmt: skip
        for value in (0, 1, 0x7FFF, 0xFFFF, 0xFFFFFFFF if form == "<I" else 0xFFFE):
            spoilt = patched(central + at, form, value)
            if spoilt != whole:
                yield f"{field} of {value}", spoilt
    for field, at in ("entries", 10), ("directory size", 12), ("directory offset", 16):
        for value in (0xFFFFFFFF, 0x7FFFFFFF, central + 1):
            if field != "entries":  # zipfile counts them itself
                yield f"{field} of {value}", patched(end + at, "<I", value)
    yield "comment longer than the file", patched(end + 20, "<H", 77)
    yield "other name at its place", patched(local + 30, "<B", ord("b"))
    twice = whole[central : whole.index(b"PK\1\2", central + 1)]
    more = whole[:central] + twice + whole[central:]
    yield (
        "one place twice",
        patched(more.index(b"PK\5\6") + 12, "<I", end - central + len(twice), more),
    )
    for cut in good.rng.sample(range(9, len(whole)), 6):
        yield f"cut at {cut}", whole[:cut]
    for _ in range(3):
        garbage = good.rng.randbytes(good.rng.randrange(1, 300))
        yield f"{len(garbage)} bytes after it", whole + garbage
        yield f"{len(garbage)} bytes before it", b"PK\3\4" + garbage + whole
    yield "two of them", whole + whole
    yield "zip64 that lies", _zip64(members, size=2**60)
    yield "zip64 with a negative offset", _zip64(members, offset=2**64 - 1)
    yield "extra fields that are cut", patched(central + 30, "<H", 3)
    for size in (MAX_BYTES + 1, 8 * MAX_BYTES):
        yield f"bomb of {size}", zipped([members[0], (WEIGHTS_FILE, bytes(size))])
        yield f"configuration bomb of {size}", zipped([(CONFIG_FILE, bytes(size)), members[1]])
    parts = [(f"{n}/adapter_model.safetensors", bytes(MAX_BYTES // 8)) for n in range(9)]
    yield "bomb in parts", zipped([*members, *parts])
    yield "nested bomb", zipped([("a.zip", zipped([("b.zip", zipped([("c", bytes(10**7))]))]))])
    torch_save = [("archive/data.pkl", pickle.dumps(print)), ("archive/data/0", bytes(400))]
    yield "torch.save", zipped(torch_save, zipfile.ZIP_STORED)


def _zip64(members: list[Member], size: int | None = None, offset: int | None = None) -> bytes:
    """Its first member with a zip64 field of that size or offset."""
    whole = zipped(members)
    central, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    field = 24 if size is not None else 42
    extra = struct.pack("<HHQ", 1, 8, size if offset is None else offset)
    entry = bytearray(whole[central : central + 46 + len(members[0][0])])
    entry[field : field + 4] = b"\xff" * 4
    entry[30:32] = struct.pack("<H", len(extra))
    rest = whole[central + len(entry) : end]
    tail = bytearray(whole[end:])
    tail[12:16] = struct.pack("<I", end - central + len(extra))
    return whole[:central] + bytes(entry) + extra + rest + bytes(tail)


def _tars(good: _Good) -> Iterator[Upload]:
    members = good.members()
    whole = tarred(members)
    plain = gzip.decompress(whole)

    def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Any:
        header = tarfile.TarInfo(name)
        header.type, header.linkname, header.size = kind, link, size
        return header

    for kind in (
        tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE, b"9", b"V", b"M", b"D",
    ):  # fmt: skip
        for name, link in ((CONFIG_FILE, "/etc/passwd"), ("acme", "../..")):
            form = good.rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
            yield f"{name} of type {kind!r}", tarred([info(name, kind, link), *members], form)
    escaping = [info("acme", tarfile.SYMTYPE, "/tmp")]
    yield "link and a file below it", tarred([*escaping, *((f"acme/{n}", c) for n, c in members)])
    for cut in good.rng.sample(range(10, len(whole)), 6):
        yield f"cut at {cut}", whole[:cut]
    for cut in good.rng.sample(range(0, 1024 + len(members[1][1]), 512), 4):
        yield f"inner cut at {cut}", gzip.compress(plain[:cut])
    for at in (-1, -5, 3, 2):  # length, checksum, flags, method
        yield f"gzip byte {at}", whole[:at] + bytes([whole[at] ^ 0xE5]) + whole[at:][1:]
    for _ in range(3):
        garbage = good.rng.randbytes(good.rng.randrange(1, 300))
        yield f"{len(garbage)} bytes after it", whole + garbage
        yield f"{len(garbage)} bytes after its end inside", gzip.compress(plain + garbage)
    yield "zeros after it", whole + bytes(512)
    yield "two of them", whole + whole
    yield "endless gzip files", whole + gzip.compress(b"") * 200_000
    yield "endless zeros", gzip.compress(plain + bytes(8 * MAX_BYTES), 1)
    yield "endless name of the gzip file", whole[:3] + b"\x08" + whole[4:10] + b"x" * MAX_BYTES
    second = 512 + -(-len(members[0][1]) // 512) * 512
    for offset, value in ((0, b"\xff"), (148, b"9"), (124, b"-1"), (124, b"\xff" * 12)):
        spoilt = plain[: second + offset] + value + plain[second + offset + len(value) :]
        yield f"header of the second with {value!r} at {offset}", gzip.compress(spoilt)
    for size in (2**33, 2**60, 2**88 - 1, -512, -1, -(2**62)):
        yield f"size of {size}", tarred([*members, info("x", size=size)], tarfile.GNU_FORMAT)
        sized = info("x")
        sized.pax_headers = {"size": str(size)}
        if size < 2**62:
            yield f"pax size of {size}", tarred([sized, *members])
    for kind in (b"L", b"K", b"x", b"g", b"X"):
        long = _header(kind, 5_000_192) + b"a" * 5_000_192
        yield f"{kind!r} of 5 MB", gzip.compress(long + plain, 1)
        yield f"{kind!r} in a chain", gzip.compress(_header(kind, 0) * 5000 + plain)
        yield f"{kind!r} of -512", gzip.compress(_header(kind, -512) + plain)
    digits = _header(b"x", 2048) + b"1" * 2048
    yield "pax headers that take long", gzip.compress(digits * 200 + plain)
    for sparse in (
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}, {"GNU.sparse.map": "x"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"},
        {"GNU.sparse.size": "99999999999999", "GNU.sparse.offset": "1"},
    ):  # fmt: skip
        header = info("x", size=0)
        header.pax_headers = sparse
        yield f"sparse {sorted(sparse)}", tarred([*members, header])
    for size in (MAX_BYTES + 1, 8 * MAX_BYTES):
        yield f"bomb of {size}", tarred([members[0], (WEIGHTS_FILE, bytes(size))])
        yield f"bomb beside it of {size}", tarred([*members, ("optimizer.pt", bytes(size))])
    yield "bomb of small files", tarred([*members, *((f"{n}", bytes(9**5)) for n in range(150))])


def _header(kind: bytes, size: int) -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT)


def _folders(good: _Good) -> Iterator[Upload]:
    config, weights = good.members()
    packs: tuple[tuple[str, Callable[[list[Member]], bytes]], ...] = (
        ("zip", zipped),
        ("tar", tarred),
    )
    for kind, pack in packs:
        for extra in (
            "adapter_model.bin", "adapter.pt", "weights.pth", "last.ckpt", "model.pkl",
            "adapter_model-00001-of-00002.safetensors", "model.safetensors", "notes.txt",
        ):  # fmt: skip
            spoilt = [config, (extra, pickle.dumps(print))]
            yield f"{kind} with only {extra}", pack(spoilt)
        for name, members in (
            ("nothing", [("README.md", b"")]), ("only weights", [weights]),
            ("only a configuration", [config]), ("configuration twice", [config, config, weights]),
            ("weights twice", [config, weights, weights]),
            ("a name written in two ways", [config, weights, ("./" + config[0], config[1])]),
            ("file that is a folder too", [config, weights, (config[0] + "/x", b"")]),
            ("folder that is a file too", [config, ("a/b", b""), weights, ("a", b"")]),
            ("two adapters", [(f"{n}/{m[0]}", m[1]) for n in "ab" for m in (config, weights)]),
            ("PEFT's and MLX's weights", [config, weights, ("adapters.safetensors", weights[1])]),
            ("too many folders", [(f"a/b/c/d/{m[0]}", m[1]) for m in (config, weights)]),
            ("300 files", [config, weights, *((f"{n}.txt", b"") for n in range(300))]),
            ("9000 files", [*((f"{n}.txt", b"") for n in range(9000)), config, weights]),
            ("an archive of it", [("acme.zip", zipped([config, weights]))]),
            ("files of Apple only", [("__MACOSX/._" + m[0], m[1]) for m in (config, weights)]),
        ):  # fmt: skip
            yield f"{kind} with {name}", pack(members)


def _configs(good: _Good) -> Iterator[Upload]:
    def text(**changes: object) -> str:
        return json.dumps({**good.config, **changes})

    plain = text()
    texts = {
        "empty": "", "cut": plain[:-1], "a list": "[]", "null": "null", "nothing in it": "{}",
        "a comment": plain + " //", "two": plain + plain, "a key twice": plain[:-1] + ', "r": 4}',
        "a key twice within": plain[:-1] + ', "rank_pattern": {"q": 4, "q": 4}}',
        "40,000 keys and one twice": "{" + ",".join(f'"{n}":0' for n in range(40_000)) + ',"7":0}',
        "long": plain + " " * 512 * 1024, "NaN": text(lora_alpha=math.nan),
        "Infinity": text(lora_alpha=math.inf), "-Infinity": text(lora_dropout=-math.inf),
        "1e400": plain[:-1] + ', "lora_dropout": 1e400}',
        "-1e999999": plain[:-1] + ', "layers_pattern": [-1e999999]}',
        "5000 digits": plain[:-1] + f', "x": {"9" * 5000}}}',
        "a huge float": plain[:-1] + f', "x": {"9" * 400_000}.0}}',
        "all lists": plain[:-1] + f', "x": [{"[]," * 150_000}[]]}}',
        "all objects": plain[:-1] + f', "x": [{"{}," * 150_000}[]]}}',
        "other alphabet": "\ufeff\ufeff" + plain, "half a pair": plain[:-1] + ', "\\ud800": 1}',
    }  # fmt: skip
    for depth in (40, 400, 900, 1000, 3000, 100_000):
        texts[f"lists {depth} deep"] = plain[:-1] + f', "x": {"[" * depth}{"]" * depth}}}'
        texts[f"objects {depth} deep"] = (
            plain[:-1] + ', "x": ' + '{"a":' * depth + "1" + "}" * (depth + 1)
        )
    rank = good.config["r"]
    for field, values in {
        "r": (0, -1, rank + 1, 100_000, 2**63, 10**39, 10**400, 1.5, True, "8", None, [8], {}),
        "lora_alpha": (10**39, 1e39, -1e300, "16", None, [1], True),
        "peft_type": (None, "VERA", "LORA\n", ["LORA"], {"a": 1}, "x" * 10_000),
        "use_rslora": ("no", 2, [], [1]), "bias": ("all", [], 0), "use_dora": (True,),
        "modules_to_save": (["lm_head"], "x" * 5000), "rank_pattern": ([1], "x", {"q_proj": 0}),
        "alpha_pattern": ({"(": 1}, {"q_proj": "x"}, {"a{9999999999}": 1}, {"(" * 400: 1}),
        "new\n\x1b[2J\U000e0001" * 50: (1, "\U000e0001" * 500),
        "layers_to_transform": ("all", [[0]], [None], {"a": 1}, 1.5),
        "init_lora_weights": ("pissa", "x" * 9000, {"a": 1}),
    }.items():  # fmt: skip
        for number, value in enumerate(values):
            if not (field == "use_rslora" and value == []):  # as good as false
                texts[f"{field[:20]!r} number {number}"] = text(**{field: value})
    for number, pattern in enumerate(
        ("(a+)+$", "(.*)*x", "(a|a)" * 60, ".*" * 20 + "x", ".*" * 200, "x*" * 500, r"(.*)\1\1",
         "(?=(.*.*.*.*))x", "((((.*)?)?)?)?", ".{0,50}" * 9, "(||" * 300, "a" * 1001,
         "(" * 90 + ".*" * 9 + ")" * 90, "(x?){99}", "([^q]*,)*", "(?:a?){64}a{64}")
    ):  # fmt: skip
        for field in ("rank_pattern", "alpha_pattern"):
            texts[f"{field} {number} that takes long"] = text(**{field: {pattern: rank}})
    names = {f"layers.{n}.q_proj": rank for n in range(20_000)}
    texts["20,000 patterns"] = text(rank_pattern=names)
    texts["1000 fields that are not known"] = text(**{f"x\n{n}" * 30: n for n in range(1, 1001)})
    both = {"peft_type": "SHARELORA", "share": "AB"}
    texts["layers of another base"] = text(layers_to_transform=[*range(100_000)], **both)
    texts["layers that no base has"] = text(layers_to_transform=[10**9, -1, 10**4000], **both)
    texts["sharing that is not there"] = text(**both)
    texts["sharing of what is no side"] = text(peft_type="SHARELORA", share="C" * 9000)
    for kind, spoilt in texts.items():
        yield kind, good.packed(config=spoilt.encode(errors="surrogatepass"))
        if len(spoilt) < 1024**2 and kind != "other alphabet":
            yield f"{kind}, as metadata", good.weights.file(config=spoilt)
    for kind, raw in (("not UTF-8", plain.encode() + b"\xff"), ("of zeros", bytes(5000))):
        yield kind, good.packed(config=raw)
    yield "compressed twice", good.packed(config=zlib.compress(plain.encode()))
