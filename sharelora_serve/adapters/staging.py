"""An adapter made ready for a pool: cast, hashed, and its page table laid out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.cast import cast_factor
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.pages import PAGE_RANK
from sharelora_serve.errors import AdapterInvalidError

_MAX_LISTED = 10  # problems spelled out in one message; the rest are counted


class FactorKey(NamedTuple):
    """What makes two factors one: rank-major bytes in the pool's dtype, scales and shape."""

    digest: bytes
    rank: int
    features: int

    @property
    def num_pages(self) -> int:
        """Pages that hold its rows."""
        return -(-self.rank // PAGE_RANK)

    @property
    def num_elements(self) -> int:
        """Elements of its pages, padding included."""
        return self.num_pages * PAGE_RANK * self.features


@dataclass(frozen=True, slots=True, eq=False)
class StagedAdapter:
    """An adapter cast and hashed for one pool, so that placing it again costs no second pass.

    factors       every distinct one
    numbers       of the factors, one after the other, in the pool's dtype: host memory of its own
    pairs         (num_pairs, 2) int32, A and B among the factors, by the page table's entries
    offsets       of the page table, as is scaling
    num_expanded  elements of the factors if every pair had its own: plain LoRA
    """

    factors: tuple[FactorKey, ...] = field(repr=False)
    numbers: Tensor = field(repr=False)
    pairs: npt.NDArray[np.int32] = field(repr=False)
    offsets: npt.NDArray[np.int32] = field(repr=False)
    scaling: npt.NDArray[np.float32] = field(repr=False)
    num_expanded: int

    @property
    def num_bytes(self) -> int:
        """Of host memory that the factors take."""
        return self.numbers.untyped_storage().nbytes()


def stage(adapter: Adapter, layout: BaseLayout, dtype: torch.dtype) -> StagedAdapter:
    """Cast and hash an adapter's factors; AdapterInvalidError if the dtype cannot hold one.

    Refused are values that overflow, more than 1 % of a factor's nonzero values lost to
    underflow, and a rank row that int8 changes by a tenth.
    """
    originals = distinct_factors(adapter)
    room = torch.empty(sum(rows.numel() for _, rows in originals.values()), dtype=dtype)
    indices: dict[FactorKey, int] = {}
    scales: dict[FactorKey, Tensor] = {}
    keys: dict[tuple[int, str], FactorKey] = {}
    lost: dict[str, str | None] = {}
    end = 0
    for identity, (name, original) in originals.items():
        cast = cast_factor(original, dtype)
        lost[name] = cast.lost
        rows = room[end : end + original.numel()].view(original.shape).copy_(cast.rows)
        content = hashlib.sha256(rows.view(torch.uint8).numpy().data)
        content.update(cast.scales.numpy().data)
        key = FactorKey(content.digest(), *rows.shape)
        keys[identity] = key
        if key not in indices:
            indices[key], scales[key] = len(indices), cast.scales
            end += original.numel()
    _refuse(adapter, dtype, lost)
    pairs: list[tuple[FactorKey, FactorKey]] = []
    offsets = np.zeros(layout.num_entries + 1, dtype=np.int32)
    scaling: list[float] = []  # of each page, the numbers' own scales apart
    num_expanded = 0
    for place, pair in sorted(adapter.pairs.items(), key=lambda item: layout.entry(*item[0])):
        a, b = keys[id(pair.a), "lora_A"], keys[id(pair.b), "lora_B"]
        assert a.rank == b.rank, "A and B differ in rank"
        pairs.append((a, b))
        offsets[layout.entry(*place) + 1] = a.num_pages
        scaling += [pair.scaling] * a.num_pages
        num_expanded += a.rank * (a.features + b.features)
    a_scales, b_scales = (
        torch.cat([scales[key] for key in side]).double().numpy()
        for side in zip(*pairs, strict=True)
    )
    return StagedAdapter(
        tuple(indices),
        room[:end],
        np.array([(indices[a], indices[b]) for a, b in pairs], np.int32),
        np.cumsum(offsets, dtype=np.int32),
        (np.array(scaling) * (a_scales * b_scales)).astype(np.float32),
        num_expanded,
    )


def distinct_factors(adapter: Adapter) -> dict[tuple[int, str], tuple[str, Tensor]]:
    """(id, side) -> (name of its first use, (rank, features) view), each Tensor object once."""
    factors: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for (layer, module), pair in adapter.pairs.items():
        for side, tensor in ("lora_A", pair.a), ("lora_B", pair.b):
            if (id(tensor), side) not in factors:
                rows = tensor if side == "lora_A" else tensor.T
                factors[id(tensor), side] = f"model.layers.{layer}.{module}.{side}", rows
    return factors


def _refuse(adapter: Adapter, dtype: torch.dtype, lost: Mapping[str, str | None]) -> None:
    if problems := [f"{name}: {what}" for name, what in lost.items() if what]:
        listed = problems[:_MAX_LISTED]
        if len(problems) > _MAX_LISTED:
            listed.append(f"and {len(problems) - _MAX_LISTED} more factors")
        way_out = (
            "Serve with --adapter-dtype auto, or even the rank rows out: row r of A times c "
            "and column r of B divided by c are the same adapter."
            if dtype == torch.int8
            else "Serve with --dtype float32 or bfloat16, or rescale the factors: "
            "B times c and A divided by c are the same adapter."
        )
        raise AdapterInvalidError(
            f"adapter {adapter.name!r} cannot be held in "
            f"{str(dtype).removeprefix('torch.')}:\n  " + "\n  ".join(listed) + f"\n{way_out}"
        )
