"""/v1/models through the official client."""

import openai
import pytest
from openai import OpenAI

from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE


def test_the_list_has_the_base_and_every_adapter_with_root_and_parent(client: OpenAI) -> None:
    base, *adapters = client.models.list().data
    assert (base.id, base.object, base.root, base.parent) == (BASE, "model", BASE, None)
    assert [adapter.id for adapter in adapters] == list(NAMES)
    roots = {adapter.root for adapter in adapters}
    assert len(roots) == len(NAMES), "every adapter has its own digest"
    assert all(adapter.parent == BASE for adapter in adapters)


@pytest.mark.parametrize("name", [BASE, *NAMES])
def test_a_model_is_shown_as_it_is_listed(name: str, client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list().data}
    assert client.models.retrieve(name) == listed[name]


@pytest.mark.parametrize("name", ["unknown", "a/b/c", "../acme", "Acme", "acme "])
def test_an_unknown_model_is_not_found_and_never_the_base(name: str, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as shown:
        client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError) as completed:
        client.completions.create(model=name, prompt="Hello")
    with pytest.raises(openai.NotFoundError) as chatted:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hello"}])
    for caught in completed, chatted:
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
        assert repr(name) in caught.value.message
        assert "x-adapter-version" not in caught.value.response.headers
    assert shown.value.status_code == 404
