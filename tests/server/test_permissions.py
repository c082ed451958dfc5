"""What a caller is shown of the adapters that there are."""

from itertools import permutations
from types import SimpleNamespace
from typing import Any

from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.server.caller import ANONYMOUS_ADMIN, Caller
from sharelora_serve.server.permissions import visible

PUBLIC, OWN = AdapterName(None, "support"), AdapterName("acme", "support")
NAMES = (PUBLIC, OWN, AdapterName("bolt", "support"), AdapterName(None, "other"))


def test_a_tenants_own_adapter_is_listed_in_place_of_the_public_one() -> None:
    for names in permutations(NAMES):
        adapters = [SimpleNamespace(name=name) for name in names]
        registry: Any = SimpleNamespace(adapters=lambda adapters=adapters: adapters)
        seen = visible(Caller("acme"), registry)
        assert {shown: item.name for shown, item in seen.items()} == {
            "support": OWN,
            "other": NAMES[3],
        }
        assert visible(ANONYMOUS_ADMIN, registry).keys() == {name.text for name in names}
