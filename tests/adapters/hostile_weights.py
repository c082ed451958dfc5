"""Safetensors files that are damaged, that lie, or that hold no adapter of the base."""

import json
import random
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from sharelora_serve.adapters.layout import BaseLayout

MODULE = "self_attn.q_proj"


class Stored(NamedTuple):
    """A tensor of a file; float32 unless it says otherwise."""

    shape: tuple[int, ...]
    data: bytes
    dtype: str = "F32"


class Weights(NamedTuple):
    """The factors of a small adapter that is taken."""

    tensors: dict[str, Stored]
    rank: int

    @classmethod
    def drawn(cls, layout: BaseLayout, rng: random.Random) -> "Weights":
        """Both factors of one module in each of two layers at most."""
        rank = rng.randrange(2, 6)
        in_features, out_features = layout.shapes[MODULE]
        tensors = {}
        for layer in range(min(2, layout.num_layers)):
            for side, shape in ("A", (rank, in_features)), ("B", (out_features, rank)):
                tensors[key(layer, side)] = drawn(rng, *shape)
        return cls(tensors, rank)

    def file(self, config: str | None = None, **changes: Stored) -> bytes:
        """As a safetensors file, with other tensors and its configuration as metadata."""
        header, data = parts({**self.tensors, **changes})
        if config is not None:
            header["__metadata__"] = {"adapter_config": config}
        return safetensors(header, data)


def key(layer: int, side: str, module: str = MODULE) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"


def drawn(rng: random.Random, *shape: int) -> Stored:
    count = shape[0] * shape[1]
    values = [rng.uniform(-1, 1) for _ in range(count)]
    return Stored(shape, struct.pack(f"<{count}f", *values))


def parts(tensors: dict[str, Stored]) -> tuple[dict[str, Any], bytes]:
    """The header, as JSON takes it, and the data of a file of these tensors."""
    header: dict[str, Any] = {}
    data = b""
    for name, stored in tensors.items():
        offsets = [len(data), len(data) + len(stored.data)]
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": offsets}
        data += stored.data
    return header, data


def safetensors(header: dict[str, Any] | str | bytes, data: bytes, length: int = -1) -> bytes:
    """A file that says that its header has `length` bytes; -1: as many as it has."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length < 0 else length) + raw + data


def hostile_weights(
    layout: BaseLayout, good: Weights, rng: random.Random, config: str | None = None
) -> Iterator[tuple[str, bytes]]:
    """Kind and content of files that are refused, each with the configuration as metadata."""
    metadata = {} if config is None else {"__metadata__": {"adapter_config": config}}
    header, data = parts(good.tensors)
    header = {**metadata, **header}
    a, b = key(0, "A"), key(0, "B")
    text = json.dumps(header)
    size = len(data)

    for length in (0, 1, len(text) - 1, len(text) + 1, 10**6, 2**31, 2**62, 2**63, 2**64 - 1):
        yield f"length of {length}", safetensors(text, data, length)
    for cut in rng.sample(range(9, 8 + len(text) + size), 6):
        yield f"cut at {cut}", safetensors(text, data)[:cut]
    for number in (1, rng.randrange(2, 5000)):
        yield f"{number} bytes more", safetensors(text, data + rng.randbytes(number))
    yield "long header", safetensors(text + " " * 5 * 2**20, data)
    yield "bytes that are no text", safetensors(text.encode() + b"\xff", data)
    yield "a list", safetensors("[]", b"")
    yield "nothing", safetensors("{}", b"")
    if metadata:
        yield "no tensors", safetensors(metadata, b"")
    for depth in (100, 900, 50_000):
        yield f"{depth} deep", safetensors(text[:-1] + ', "x": ' + "[" * depth, data)

    def changed(name: str, **fields: Any) -> bytes:
        return safetensors({**header, name: {**header[name], **fields}}, data)

    begin, end = header[b]["data_offsets"]
    for offsets in (
        [begin - 4, end], [begin - 4, end - 4], [begin + 4, end], [end, begin], [0, end - begin],
        [-4, end], [begin, 2**63], [2**64 - 4, 2**64], [begin], [begin, end, end], "x", None,
        [begin, 10**40], [begin + 0.5, end],
    ):  # fmt: skip
        yield f"offsets {offsets}", changed(b, data_offsets=offsets)
    shape = list(header[b]["shape"])
    for wrong in (
        [], [1], shape[:1], [*shape, 2], [-1, -1], [2**32, 2**32], [2**63, 2], [10**30, 1], "x",
        None, [True, 3], [shape[0] * shape[1]], [shape[0], shape[1], 1], [1, *shape], shape[::-1],
        [1] * 100_000 + shape,
    ):  # fmt: skip
        if wrong != shape:
            yield f"shape {str(wrong)[:30]}", changed(b, shape=wrong)
    for dtype in ("F64", "I8", "BOOL", "F8_E4M3", "f32", "", None, 3, "F32\n", "x" * 9000, "I32"):
        yield f"type {str(dtype)[:9]!r}", changed(a, dtype=dtype)
    yield "a tensor without a type", safetensors({**header, a: {"shape": [1]}}, data)
    yield "a tensor with a field more", changed(a, layout="sparse", dtype="F16")

    entry = json.dumps({a: header[a]})[1:-1]
    yield "a tensor twice", safetensors(text[:-1] + "," + entry + "}", data)
    empty = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    yield "a field twice", safetensors(text[:-1] + f',"x":{{{empty},"shape":[0]}}}}', data)
    for value in ({"a": 1}, {"a": None}, {"a": {}}, [], "x", 1, {"a": ["x"]}):
        yield f"metadata {value!r}", safetensors({**header, "__metadata__": value}, data)
    twice = '"__metadata__":{"adapter_config":"{}","adapter_config":"[]"}'
    without = json.dumps({name: of for name, of in header.items() if name != "__metadata__"})
    yield "metadata with a key twice", safetensors(without[:-1] + "," + twice + "}", data)
    plain = '"__metadata__":{}'
    yield (
        "metadata twice",
        safetensors(without[:-1] + "," + plain + "," + twice.replace("[]", "{}") + "}", data),
    )

    def with_tensors(**tensors: Stored) -> bytes:
        of, content = parts({**good.tensors, **tensors})
        return safetensors({**metadata, **of}, content)

    nothing = Stored((0,), b"")
    for count in (50, 3000, 15_000):
        many = {f"x.{n}": nothing for n in range(count)}
        yield f"{count} tensors more", with_tensors(**many)
    yield (
        "tensors of many models",
        with_tensors(
            **{key(0, "A").replace("weight", f"{n}.weight"): nothing for n in range(2000)}
        ),
    )
    for wrong_shape in (
        (0, 2**64 - 1), (0, 2**62, 2**62), (2**64 - 1, 0), (0,), (0, 0), (2**63, 0, 2**63),
        (0, *([1] * 70)),
    ):  # fmt: skip
        yield f"empty of {str(wrong_shape)[:40]}", with_tensors(**{a: Stored(wrong_shape, b"")})
    in_features, out_features = layout.shapes[MODULE]
    yield (
        "rank of 0",
        with_tensors(**{a: Stored((0, in_features), b""), b: Stored((out_features, 0), b"")}),
    )
    for rank in (good.rank + 1, layout.feature_counts[-1] + 1):
        ones = b"\x00\x3c"
        yield (
            f"rank of {rank}",
            with_tensors(
                **{
                    a: Stored((rank, in_features), ones * rank * in_features, "F16"),
                    b: Stored((out_features, rank), ones * rank * out_features, "F16"),
                }
            ),
        )
    for value in ("nan", "inf", "-inf"):
        for name in (a, b):
            at = 4 * rng.randrange(len(good.tensors[name].data) // 4)
            spoilt = bytearray(good.tensors[name].data)
            spoilt[at : at + 4] = struct.pack("<f", float(value))
            stored = Stored(good.tensors[name].shape, bytes(spoilt))
            yield f"{value} in {name[-13:]}", with_tensors(**{name: stored})
    zeros = {name: Stored(of.shape, bytes(len(of.data))) for name, of in good.tensors.items()}
    yield "nothing but zeros", with_tensors(**zeros)
    yield "another module's shape", with_tensors(**{a: drawn(rng, good.rank, in_features + 1)})
    names = (
        "x\n\x1b[2Jy", "x" * 10_000, "", ".", "\U000e0001" * 200, "..", "layers.0", "a\u202eb",
        key(layout.num_layers, "A"), key(10**6, "B"), key(0, "A").replace(".0.", ".-1."),
        key(0, "A").replace(".0.", f".{'9' * 140}."), key(0, "A").replace(".0.", ".٣."),
        key(0, "A", "self_attn.rotary"), key(0, "C"), "shared.self_attn.q_proj.lora_A.weight",
        key(0, "A").replace("weight", "default.weight"), "../../x", "lm_head.weight",
        key(0, "B").replace("weight", "bias"), key(0, "A").replace("model.model.", "vision."),
    )  # fmt: skip
    for number, name in enumerate(names):
        yield (
            f"tensor {number}, {name[:40]!r}",
            with_tensors(**{name: drawn(rng, good.rank, in_features)}),
        )
    for missing in (a, b):
        rest = {name: of for name, of in good.tensors.items() if name != missing}
        of, content = parts(rest)
        yield f"without {missing[-13:]}", safetensors({**metadata, **of}, content)
