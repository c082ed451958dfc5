"""How the log is written: one event a line with its fields, for people or for machines."""

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS, merge_record_extra
from pythonjsonlogger.json import JsonFormatter

_NO_FIELDS = [*RESERVED_ATTRS, "color_message"]  # the last is uvicorn's, with escape sequences
_PLAIN_VALUE = re.compile(r'[^\s"=]+')


def configure_logging(level: str, log_format: Literal["text", "json"]) -> None:
    """Send what is logged from `level` on, and Python's warnings, to standard error.

    To be called again after slow imports: libraries that bring handlers of their own keep them,
    and write the same lines from then on.
    """
    formatter = TextLines() if log_format == "text" else JsonLines()
    root_handler = logging.StreamHandler()
    root_handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[root_handler], force=True)
    logging.captureWarnings(True)
    for logger in logging.root.manager.loggerDict.values():
        for handler in logger.handlers if isinstance(logger, logging.Logger) else []:
            if type(handler) is logging.StreamHandler:
                handler.setFormatter(formatter)


def request_fields(state: Mapping[str, Any]) -> dict[str, object]:
    """Whom a line about a request is about, from its scope's `state`: `request_id` and `tenant`.

    `tenant` is that of `state["caller"]`, None without one.
    """
    tenant = getattr(state.get("caller"), "tenant", None)
    return {"request_id": state["request_id"], "tenant": tenant}


class TextLines(logging.Formatter):
    """Time, level, logger, message, then the fields as key=value; a traceback follows."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, without a traceback."""
        fields = merge_record_extra(record, {}, _NO_FIELDS)
        pairs = (f" {key}={_value_text(value)}" for key, value in fields.items())
        return super().formatMessage(record) + "".join(pairs)


class JsonLines(JsonFormatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message, and the fields."""

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            reserved_attrs=_NO_FIELDS,
        )

    def formatTime(  # noqa: N802 - logging's name
        self,
        record: logging.LogRecord,
        datefmt: str | None = None,  # noqa: ARG002 - there is one form
    ) -> str:
        """When it happened."""
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _value_text(value: object) -> str:
    """A value that ends where the next field begins: quoted if it would not."""
    if value is None:
        return "none"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text)
