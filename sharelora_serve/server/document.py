"""What the OpenAPI document says of routes that read their bodies themselves.

It comes from the models that parse the bodies, so it cannot say anything else than they do.
"""

from typing import Any

from pydantic import BaseModel

IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "description": "The version that must be there now, as the header ETag gave it.",
    "schema": {"type": "string"},
}
"""The header of every request that changes an adapter."""


def takes_json(model: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that `model` parses."""
    return _takes("application/json", _schema(model), is_required)


def takes_form(model: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra` for a multipart form with the fields of `model`."""
    return _takes("multipart/form-data", _schema(model), is_required=True)


def _takes(media_type: str, schema: dict[str, Any], is_required: bool) -> dict[str, Any]:
    content = {media_type: {"schema": schema}}
    return {"requestBody": {"content": content, "required": is_required}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema in one piece: a reference would be looked up in the document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def whole(part: Any) -> Any:  # noqa: ANN401 - JSON is any value
        if isinstance(part, list):
            return [whole(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(definitions[part["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in part.items()}

    inlined: dict[str, Any] = whole(schema)
    return inlined
