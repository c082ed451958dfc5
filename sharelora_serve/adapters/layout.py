"""Which linear layers a base has: what every adapter is read, checked and paged against."""

from dataclasses import dataclass

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The adaptable modules of a decoder layer, in the order of the page tables."""


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """The shapes that an adapter must fit.

    name          the base's name as users see it
    num_layers    decoder layers
    shapes        module of MODULES -> (in_features, out_features)
    """

    name: str
    num_layers: int
    shapes: dict[str, tuple[int, int]]

    @property
    def feature_counts(self) -> list[int]:
        """Every distinct in_features or out_features, ascending: the widths of rank pages."""
        return sorted({width for shape in self.shapes.values() for width in shape})

    def entry(self, layer: int, module: str) -> int:
        """Index of [layer, module] in a page table."""
        return layer * len(MODULES) + MODULES.index(module)

    @property
    def num_entries(self) -> int:
        """Entries of a page table: layers times modules."""
        return self.num_layers * len(MODULES)
