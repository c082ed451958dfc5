"""An adapter made ready for a pool: cast, hashed, and its page table laid out."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.cast import CastFactor, cast_factor
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

    pairs         of A and B, in the order of the page table's entries
    factors       every distinct one, in the pool's dtype on the host
    offsets       of the page table, as is scaling
    num_expanded  elements of the factors if every pair had its own: plain LoRA
    """

    pairs: list[tuple[FactorKey, FactorKey]]
    factors: dict[FactorKey, CastFactor] = field(repr=False)
    offsets: npt.NDArray[np.int32] = field(repr=False)
    scaling: npt.NDArray[np.float32] = field(repr=False)
    num_expanded: int


def stage(
    adapter: Adapter,
    layout: BaseLayout,
    dtype: torch.dtype,
    cast_rows: Callable[[Tensor], CastFactor],
) -> StagedAdapter:
    """Cast and hash an adapter's factors; AdapterInvalidError if the dtype cannot hold one.

    Refused are values that overflow, more than 1 % of a factor's nonzero values lost to
    underflow, and a rank row that int8 changes by a tenth.

    cast_rows  to the pool's dtype, where the device copies them from
    """
    keys: dict[tuple[int, str], FactorKey] = {}
    factors: dict[FactorKey, CastFactor] = {}
    lost: dict[str, str | None] = {}
    for identity, (name, original) in distinct_factors(adapter).items():
        cast = cast_rows(original)
        lost[name] = cast.lost
        content = hashlib.sha256(cast.rows.view(torch.uint8).numpy().data)
        content.update(cast.scales.numpy().data)
        keys[identity] = key = FactorKey(content.digest(), *cast.rows.shape)
        factors.setdefault(key, cast)
    _refuse(adapter, dtype, lost)
    pairs: list[tuple[FactorKey, FactorKey]] = []
    offsets = np.zeros(layout.num_entries + 1, dtype=np.int32)
    scaling: list[npt.NDArray[np.float64]] = []
    num_expanded = 0
    for place, pair in sorted(adapter.pairs.items(), key=lambda item: layout.entry(*item[0])):
        a, b = keys[id(pair.a), "lora_A"], keys[id(pair.b), "lora_B"]
        assert a.rank == b.rank, "A and B differ in rank"
        pairs.append((a, b))
        offsets[layout.entry(*place) + 1] = a.num_pages
        scales = factors[a].scales.double() * factors[b].scales.double()
        scaling.append(pair.scaling * scales.numpy())
        num_expanded += a.rank * (a.features + b.features)
    return StagedAdapter(
        pairs,
        factors,
        np.cumsum(offsets, dtype=np.int32),
        np.concatenate(scaling).astype(np.float32),
        num_expanded,
    )


def check_cast(adapter: Adapter, dtype: torch.dtype) -> None:
    """Raise AdapterInvalidError if the dtype cannot hold the adapter; see `stage`."""
    lost = {
        name: cast_factor(rows, dtype).lost for name, rows in distinct_factors(adapter).values()
    }
    _refuse(adapter, dtype, lost)


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
