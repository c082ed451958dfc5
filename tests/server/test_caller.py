"""What a name means to a caller: one's own, then what is public, and never what is another's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.errors import PermissionDeniedError
from sharelora_serve.server.caller import ANONYMOUS_ADMIN, Caller, require_admin

ACME = Caller(tenant="acme")
ADMIN = Caller(tenant=None)

NAMES = st.sampled_from(["acme", "bolt", "a", "..", "", "-", "a b", "A.9_-"])
MODELS = st.one_of(st.text(), st.lists(NAMES, max_size=4).map("/".join))
CALLERS = st.sampled_from([ACME, Caller("bolt"), Caller("A.9_-"), ADMIN])


def test_a_tenants_own_adapter_comes_before_the_public_one() -> None:
    assert ACME.candidates("support") == [
        AdapterName("acme", "support"),
        AdapterName(None, "support"),
    ]
    assert ACME.candidates("acme/support") == [AdapterName("acme", "support")]


def test_an_admin_writes_the_owner() -> None:
    assert ADMIN == ANONYMOUS_ADMIN
    assert ADMIN.candidates("support") == [AdapterName(None, "support")]
    assert ADMIN.candidates("acme/support") == [AdapterName("acme", "support")]


@pytest.mark.parametrize("model", ["bolt/support", "Acme/support", "acme/acme/support", "acme/"])
def test_a_tenant_does_not_reach_anothers_by_writing_its_owner(model: str) -> None:
    assert ACME.candidates(model) == []


@given(CALLERS, MODELS)
def test_whatever_is_asked_for_only_what_may_be_seen_is_meant(caller: Caller, model: str) -> None:
    meant = caller.candidates(model)
    for name in meant:
        assert caller.may_see(name)
        assert caller.is_admin or name.owner in (None, caller.tenant)
        assert AdapterName.parse(name.text) == name
        assert model in (name.name, name.text)
        assert name.owner is not None or "/" not in model
    assert len(set(meant)) == len(meant)


@given(MODELS)
def test_a_name_reads_back_or_is_none(text: str) -> None:
    name = AdapterName.parse(text)
    if name is not None:
        assert name.text == text


@pytest.mark.parametrize(
    "text",
    ["", "/", "a/", "/a", "a/b/c", "../a", "a/..", "./a", "a\\b", "a b", "a\n", "a" * 129, "\xe4"],
)
def test_what_no_adapter_is_called_means_none(text: str) -> None:
    assert AdapterName.parse(text) is None
    assert ADMIN.candidates(text) == []


def test_only_an_admin_passes_where_one_is_needed() -> None:
    require_admin(ADMIN)
    with pytest.raises(PermissionDeniedError, match="'acme'"):
        require_admin(ACME)
