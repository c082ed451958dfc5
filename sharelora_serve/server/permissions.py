"""Which adapters a caller may make and change, and what is said to one who may not.

Nothing that is said depends on whether another tenant has an adapter.
"""

from sharelora_serve.adapters.naming import AdapterName, check_name
from sharelora_serve.adapters.published import Published
from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.errors import AdapterExistsError, ModelNotFoundError, PermissionDeniedError
from sharelora_serve.server.caller import Caller


def visible(caller: Caller, registry: AdapterRegistry) -> dict[str, Published]:
    """Every adapter that a caller may see, by what the caller calls it.

    A tenant's own takes the place of a public one of the same name, as when it is asked for.
    """
    seen = [published for published in registry.adapters() if caller.may_see(published.name)]
    seen.sort(key=lambda published: published.name.owner is not None)  # public ones first
    return {caller.shown(published.name): published for published in seen}


def creatable(caller: Caller, registry: AdapterRegistry, text: str) -> AdapterName:
    """The adapter that a caller would make under a name.

    Raises AdapterInvalidError for a name that nobody can have, ModelNotFoundError for one of
    another tenant's, AdapterExistsError for a public one's: the owner's requests to that would
    be answered by the new one.
    """
    name = _meant(caller, registry, text)
    if name.owner is not None and _is_there(registry, AdapterName(None, name.name)):
        raise AdapterExistsError(
            f"{name.name!r} is the name of a public adapter; choose another", param="name"
        )
    return name


def changeable(caller: Caller, registry: AdapterRegistry, text: str) -> AdapterName:
    """The adapter that a caller would change; it need not be there for an admin.

    Raises AdapterInvalidError and ModelNotFoundError likewise, PermissionDeniedError where a
    tenant sees a public adapter of that name.
    """
    name = _meant(caller, registry, text)
    if caller.is_admin or _is_there(registry, name):
        return name
    if _is_there(registry, AdapterName(None, name.name)):
        raise PermissionDeniedError(
            f"adapter {name.name!r} is public: only an admin may change it; publish one of your "
            "own under another name"
        )
    raise unknown_adapter(text)


def unknown_adapter(text: str) -> ModelNotFoundError:
    """There is no adapter of that name, or none that the caller may know of."""
    return ModelNotFoundError(f"there is no adapter {text[:200]!r}", param="name")


def _meant(caller: Caller, registry: AdapterRegistry, text: str) -> AdapterName:
    name = AdapterName.parse(text)
    if name is None:
        check_name(text, registry.base_name)
        raise AssertionError(f"{text!r} is a name and no name")
    if caller.is_admin:
        return name
    if name.owner not in (None, caller.tenant):
        raise unknown_adapter(text)
    return AdapterName(caller.tenant, name.name)


def _is_there(registry: AdapterRegistry, name: AdapterName) -> bool:
    try:
        registry.find(name)
    except ModelNotFoundError:
        return False
    return True
