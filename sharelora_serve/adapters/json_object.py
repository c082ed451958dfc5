"""A JSON object from an uploaded file, refused where it is ambiguous or made to do harm."""

import json
import math
from collections import Counter
from typing import Any

from sharelora_serve.adapters.naming import shown
from sharelora_serve.errors import AdapterInvalidError

MAX_CONFIG_BYTES = 512 * 1024
"""Of an adapter_config.json, which can take forty times as much memory when parsed."""

_MAX_NESTING = 32  # lists and objects in each other; real ones have three
_MAX_DIGITS = 1000  # of an integer; Python itself stops at 4300


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """`text` as a JSON object, refusing what JSON readers disagree about.

    Raises AdapterInvalidError for a syntax error, a duplicate key, NaN, Infinity or a number that
    is read as such, and for more nesting or digits than any configuration has.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise AdapterInvalidError(f"the key {shown(repr(twice))} stands there twice; keep one")
        return result

    def finite(number: str) -> float:
        value = float(number)
        if math.isinf(value):
            raise AdapterInvalidError(f"{shown(number)} is too large a number")
        return value

    def not_endless(number: str) -> int:
        if len(number) > _MAX_DIGITS:
            raise AdapterInvalidError(f"{shown(number)} has more than {_MAX_DIGITS} digits")
        return int(number)

    def refuse_constant(constant: str) -> float:
        raise AdapterInvalidError(f"{constant} is not JSON; write a finite number")

    too_deep = f"has more than {_MAX_NESTING} lists or objects in each other; flatten it"
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=without_duplicates,
            parse_constant=refuse_constant,
            parse_float=finite,
            parse_int=not_endless,
        )
    except RecursionError:
        raise AdapterInvalidError(too_deep) from None
    except ValueError as error:
        raise AdapterInvalidError(f"is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise AdapterInvalidError("is not a JSON object")
    level: list[Any] = [parsed]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise AdapterInvalidError(too_deep)
    return parsed
