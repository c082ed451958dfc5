"""How adapters are named: by what clients call them and by whom they belong to."""

from dataclasses import dataclass
from typing import Self

from sharelora_serve.adapters.adapter import AdapterVersion


@dataclass(frozen=True, slots=True)
class AdapterName:
    """The name of an adapter within its owner's; owner None is a public adapter."""

    owner: str | None
    name: str

    @property
    def text(self) -> str:
        """`owner/name`, or `name` alone for a public adapter: no two adapters have the same."""
        return self.name if self.owner is None else f"{self.owner}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The name whose `text` this is."""
        owner, slash, name = text.partition("/")
        return cls(owner, name) if slash else cls(None, text)

    def version(self, digest: str) -> AdapterVersion:
        """The version of this adapter that has a digest."""
        return AdapterVersion(self.text, digest, self.owner)
