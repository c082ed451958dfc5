"""What runs element by element on CPU: norms, the gated activation, the embedding's rows."""

import math
from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.vector import float_from_bits

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@numba.njit(nogil=True, inline="always")
def exp(x: Any) -> Any:
    """e^x in float32 to 2 units in the last place, in a form that vectorises (Cephes expf)."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.float32(math.floor(x * _LOG2_E + np.float32(0.5)))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * float_from_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@numba.njit(nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def norm_row(row: Any, weight: Any, eps: Any, to: Any) -> None:
    """to = root-mean-square norm of row times weight."""
    total = np.float32(0)
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(row.shape[0]) + eps))
    for i in range(row.shape[0]):
        to[i] = row[i] * scale * weight[i]


@numba.njit(nogil=True)
def add(row: Any, more: Any) -> None:
    """row += more, from its first number on: with other bounds it would not become vectors."""
    for i in range(row.shape[0]):
        row[i] += more[i]


@numba.njit(nogil=True)
def add_part(out: Any, more: Any, t: Any, begin: Any, end: Any) -> None:
    """out[t, begin:end] += more[t, begin:end], where `more` has such a row."""
    if t < more.shape[0]:
        add(out[t, begin:end], more[t, begin:end])


@numba.njit(nogil=True)
def _add_and_norm_row(
    x: Any, delta: Any, more: Any, t: Any, weight: Any, eps: Any, out: Any
) -> None:
    add_part(delta, more, t, 0, x.shape[1])
    add(x[t], delta[t])
    norm_row(x[t], weight, eps, out[t])


@numba.njit(parallel=True, nogil=True, cache=True)
def add_and_norm(x: Any, delta: Any, more: Any, weight: Any, eps: Any, out: Any) -> None:
    """x += delta + more; out = the norm of each row.

    more  (num_tokens or 0, at least hidden_size)  float32, what adapters add to delta; 0 for none
    """
    if x.shape[0] < 4:  # starting threads would cost more than the work
        for t in range(x.shape[0]):
            _add_and_norm_row(x, delta, more, t, weight, eps, out)
    else:
        for t in numba.prange(x.shape[0]):
            _add_and_norm_row(x, delta, more, t, weight, eps, out)


@numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
def _silu_and_multiply_row(gate: Any, up: Any, to: Any) -> None:
    for i in range(to.shape[0]):
        to[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@numba.njit(parallel=True, nogil=True, cache=True)
def silu_and_multiply(gate_up: Any, more: Any, out: Any) -> None:
    """gate_up += more; out = silu(gate) * up, the two halves of gate_up; `more` as add_and_norm."""
    inner = out.shape[1]
    if out.shape[0] < 4:
        for t in range(out.shape[0]):
            add_part(gate_up, more, t, 0, 2 * inner)
            _silu_and_multiply_row(gate_up[t, :inner], gate_up[t, inner : 2 * inner], out[t])
    else:
        for t in numba.prange(out.shape[0]):
            add_part(gate_up, more, t, 0, 2 * inner)
            _silu_and_multiply_row(gate_up[t, :inner], gate_up[t, inner : 2 * inner], out[t])
