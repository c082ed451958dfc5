"""Who sends a request, what they may do, and which adapter they mean by a name."""

from dataclasses import dataclass

from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.errors import PermissionDeniedError


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a request comes from; in `request.state.caller` of every route that needs a key.

    tenant  whose adapters are the caller's own; None for an admin
    """

    tenant: str | None

    @property
    def is_admin(self) -> bool:
        """Whether everything is allowed."""
        return self.tenant is None

    def candidates(self, model: str) -> list[AdapterName]:
        """The adapters that `model` may mean to this caller, the preferred one first.

        To a tenant `name` is its own adapter, then the public one; `owner/name` is its own if the
        owner is the tenant, and nothing otherwise. To an admin `name` is the public one and
        `owner/name` the tenant's. Empty where no adapter can be meant.
        """
        named = AdapterName.parse(model)
        if named is None:
            return []
        meant = [named]
        if self.tenant is not None and named.owner is None:
            meant.insert(0, AdapterName(self.tenant, named.name))
        return [name for name in meant if self.may_see(name)]

    def shown(self, adapter: AdapterName) -> str:
        """What the caller calls an adapter that it may see."""
        return adapter.text if self.is_admin else adapter.name

    def may_see(self, adapter: AdapterName) -> bool:
        """Whether the caller may use the adapter and know that it exists."""
        return self.is_admin or adapter.owner in (None, self.tenant)


ANONYMOUS_ADMIN = Caller(tenant=None)
"""Everybody, on a server without API keys."""


def require_admin(caller: Caller) -> None:
    """Raise PermissionDeniedError if the caller is a tenant."""
    if not caller.is_admin:
        raise PermissionDeniedError(
            f"This needs an admin's API key; the one that was sent is of tenant {caller.tenant!r}."
        )
