"""Lines of the log, as text and as JSON."""

import json
import logging
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharelora_serve.server.logs import JsonLines, TextLines, request_fields

FIELDS = {"request_id": "r-1", "tenant": None, "prompt_tokens": 7, "total_seconds": 0.12345}


def record(message: str, fields: dict[str, Any], error: Exception | None = None) -> Any:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    logger = logging.getLogger("some.logger")
    return logger.makeRecord(
        logger.name, logging.WARNING, __file__, 1, message, (), exc_info, extra=fields
    )


def test_a_line_of_text_ends_with_its_fields() -> None:
    line = TextLines().format(record("generation ended", FIELDS))
    assert line.endswith(
        " WARNING some.logger: generation ended "
        "request_id=r-1 tenant=none prompt_tokens=7 total_seconds=0.123"
    )


@pytest.mark.parametrize("value", ["two words", "a=b", 'quo"te', "one\nINFO forged: line", ""])
def test_a_value_in_text_cannot_pass_for_another_field_or_line(value: str) -> None:
    line = TextLines().format(record("generation ended", {"model": value}))
    assert line.endswith(f" model={json.dumps(value)}")
    assert "\n" not in line


def test_a_json_line_has_time_level_logger_message_and_typed_fields() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    content = json.loads(JsonLines().format(record("generation ended", FIELDS)))
    time = datetime.fromisoformat(content.pop("time"))
    assert before <= time <= datetime.now(UTC)
    assert content == {
        "level": "WARNING",
        "logger": "some.logger",
        "message": "generation ended",
        **FIELDS,
    }


@given(text=st.text(), value=st.text() | st.integers() | st.none() | st.lists(st.text()))
def test_whatever_is_logged_as_json_is_one_line_that_reads_back(text: str, value: object) -> None:
    line = JsonLines().format(record(text, {"model": value}))
    assert line.isascii()
    assert "\n" not in line
    content = json.loads(line)
    assert (content["message"], content["model"]) == (text, value)


@pytest.mark.parametrize("lines", [TextLines(), JsonLines()], ids=["text", "json"])
def test_a_traceback_is_kept(lines: logging.Formatter) -> None:
    text = lines.format(record("a request failed", FIELDS, ValueError("torn")))
    assert "ValueError: torn" in text
    assert "r-1" in text.splitlines()[0]
    assert len(text.splitlines()) == (1 if isinstance(lines, JsonLines) else 2)


def test_uvicorns_coloured_copy_of_a_message_is_left_out() -> None:
    for lines in TextLines(), JsonLines():
        assert "[36m" not in lines.format(record("Started", {"color_message": "\x1b[36mStarted"}))


def test_a_request_is_named_with_its_tenant_where_one_is_known() -> None:
    caller = SimpleNamespace(tenant="acme")
    assert request_fields({"request_id": "r", "caller": caller}) == {
        "request_id": "r",
        "tenant": "acme",
    }
    assert request_fields({"request_id": "r"}) == {"request_id": "r", "tenant": None}
    assert request_fields({"request_id": "r", "caller": None})["tenant"] is None
