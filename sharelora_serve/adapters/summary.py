"""What an adapter is made of, read from its factors and never from what its file says of itself."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.adapters.naming import QKV_MODULES


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What `inspect`, the API and the log tell of an adapter.

    sharing         LoRA | ShareA | ShareB | ShareAB: the sides that are one matrix in every
                    adapted layer, for every module that is adapted in more than one
    shares_qkv      whether q, k and v read one A
    ranks           the distinct ranks, ascending
    modules         the adapted modules, in the order of MODULES
    num_layers      layers in which anything is adapted
    num_factors     distinct matrices
    stored_bytes    of the distinct matrices, in the file's own type
    expanded_bytes  of the same adapter as plain LoRA, every layer with its own A and B
    """

    sharing: str
    shares_qkv: bool
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    num_layers: int
    num_factors: int
    stored_bytes: int
    expanded_bytes: int

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            **fields | {"ranks": tuple(fields["ranks"]), "modules": tuple(fields["modules"])}
        )


def summarise(adapter: Adapter) -> AdapterSummary:
    """The summary of a validated adapter, whose equal factors are one Tensor."""
    pairs = adapter.pairs
    factors = {id(factor): factor for pair in pairs.values() for factor in (pair.a, pair.b)}
    sides = "".join(
        side
        for side, of in (
            ("A", [pair.a for pair in pairs.values()]),
            ("B", [pair.b for pair in pairs.values()]),
        )
        if _is_shared(pairs, of)
    )
    adapted = {module for _, module in pairs}
    return AdapterSummary(
        sharing=f"Share{sides}" if sides else "LoRA",
        shares_qkv=_shares_qkv(pairs),
        ranks=tuple(sorted({pair.a.shape[0] for pair in pairs.values()})),
        modules=tuple(module for module in MODULES if module in adapted),
        num_layers=len({layer for layer, _ in pairs}),
        num_factors=len(factors),
        stored_bytes=sum(factor.nbytes for factor in factors.values()),
        expanded_bytes=sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values()),
    )


def _is_shared(pairs: Mapping[tuple[int, str], FactorPair], factors: list[Tensor]) -> bool:
    """Whether the pairs' factors of one side are one matrix per module over several layers."""
    of_module: dict[str, list[int]] = defaultdict(list)
    for (_, module), factor in zip(pairs, factors, strict=True):
        of_module[module].append(id(factor))
    over_layers = [identities for identities in of_module.values() if len(identities) > 1]
    return bool(over_layers) and all(len(set(identities)) == 1 for identities in over_layers)


def _shares_qkv(pairs: Mapping[tuple[int, str], FactorPair]) -> bool:
    """Whether, wherever two or more of q, k and v are adapted, they read the same A."""
    of_layer: dict[int, list[int]] = defaultdict(list)
    for (layer, module), pair in pairs.items():
        if module in QKV_MODULES:
            of_layer[layer].append(id(pair.a))
    several = [identities for identities in of_layer.values() if len(identities) > 1]
    return bool(several) and all(len(set(identities)) == 1 for identities in several)
