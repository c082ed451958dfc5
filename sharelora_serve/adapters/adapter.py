"""One adapter in host memory: a factor pair and a scale for each adapted linear layer."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of a named adapter; a request is bound to it until it ends.

    name    what the log calls it: `owner/name` for a tenant's
    digest  what it computes (see Adapter.digest)
    owner   the tenant whose it is; None for a public adapter
    """

    name: str
    digest: str
    owner: str | None = None

    @property
    def key(self) -> str:
        """The identity. Content alone is not: what one tenant does must not show to another."""
        return f"{self.owner or ''}/{self.digest}"


@dataclass(frozen=True, slots=True)
class FactorPair:
    """delta W = scaling * B A of one linear layer.

    a        (rank, in_features)   the same Tensor object wherever the factor is shared
    b        (out_features, rank)  likewise
    scaling  alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A validated adapter. Equal factors are one Tensor object, whatever the file's form.

    name     what clients call it
    digest   hex sha256 of what it computes: the factors' bytes, their places and scales
    pairs    (layer, module of MODULES) -> FactorPair; entries that change nothing are absent
    config   the adapter_config.json it came with
    """

    name: str
    digest: str
    pairs: dict[tuple[int, str], FactorPair]
    config: dict[str, Any] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Of all factors, equal ones once."""
        tensors = {id(t): t for pair in self.pairs.values() for t in (pair.a, pair.b)}
        return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True, slots=True, eq=False)
class PageTable:
    """Where the pool holds an adapter, as the kernels read it.

    Entry e = layer * len(MODULES) + module occupies positions offsets[e] to offsets[e + 1] of the
    other arrays: position p is one rank page of A, its page of B, and the scale of both.

    offsets  (num_entries + 1,)  int32, offsets[0] = 0; equal neighbours where nothing is adapted
    a_pages  (offsets[-1],)      int32 page ids in the view of A's in_features; 0 is all zeros
    b_pages  (offsets[-1],)      int32 page ids in the view of B's out_features
    scaling  (offsets[-1],)      float32
    """

    offsets: npt.NDArray[np.int32]
    a_pages: npt.NDArray[np.int32]
    b_pages: npt.NDArray[np.int32]
    scaling: npt.NDArray[np.float32]
