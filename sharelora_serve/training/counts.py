"""How many parameters an adapter trains: LoRA's, and ShareLoRA's in each of its forms."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sharelora_serve.training.shapes import reads_as_qkv

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Method:
    """Which factors layers share (arXiv 2406.10785), and which are trained.

    share       "", "A", "B" or "AB": the sides that are one matrix per module type for all layers
    share_only  modules that share while the others are plain LoRA; None for all
    share_qkv   one A for q, k and v, which read the same input; needs A to be shared
    freeze_a    no A is trained: it is random, or another adapter's
    """

    share: str
    share_only: Collection[str] | None = None
    share_qkv: bool = False
    freeze_a: bool = False

    def shares(self, module: str, side: str) -> bool:
        """Whether the factor of a module is one for all layers."""
        return side in self.share and (self.share_only is None or module in self.share_only)


def num_trained(num_layers: int, shapes: Shapes, rank: int, method: Method) -> int:
    """Trained parameters of a method over modules of these (in_features, out_features)."""
    total, has_qkv = 0, False
    for module, (in_features, out_features) in shapes.items():
        num_a = 1 if method.shares(module, "A") else num_layers
        if method.share_qkv and method.shares(module, "A") and reads_as_qkv(module):
            num_a, has_qkv = 0 if has_qkv else 1, True
        if method.freeze_a:
            num_a = 0
        num_b = 1 if method.shares(module, "B") else num_layers
        total += rank * (num_a * in_features + num_b * out_features)
    return total


def compared_methods(shapes: Shapes) -> dict[str, Method]:
    """What the paper compares and what this server adds, by the name that people know."""
    qkv = [module for module in shapes if reads_as_qkv(module)]
    methods = {
        "LoRA": Method(""),
        "ShareA": Method("A"),
        "ShareB": Method("B"),
        "ShareAB": Method("AB"),
    }
    if qkv:
        methods["ShareA, one A for q, k, v"] = Method("A", share_qkv=True)
        methods["ShareA of q, k, v, the rest LoRA"] = Method("A", share_only=qkv)
    methods["one more tenant under a common A"] = Method("A", freeze_a=True)
    return methods
