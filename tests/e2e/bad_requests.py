"""The table of bad requests: what is sent, and how it is refused."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.e2e.conftest import BASE, MAX_REQUEST_BYTES
from tests.tiny_models import MAX_MODEL_LEN

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
VOCAB_SIZE = 49152
GOOD = {"model": BASE, "prompt": "The sea", "max_tokens": 8, "temperature": 0}
GOOD_CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A body, a dictionary or bytes as they are, and the answer that it must get."""

    name: str
    body: dict[str, Any] | bytes
    code: str
    param: str | None
    path: str = COMPLETIONS
    status: int = 400
    says: str = ""
    """Part of the message."""

    @property
    def content(self) -> bytes:
        """What is sent."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def bad_requests() -> list[BadRequest]:
    """Every row."""
    return [*_bodies(), *_models(), *_prompts(), *_ranges(), *_types(), *_lists(), *_chats()]


def _with(raw: str) -> bytes:
    """A good body and one more field, written as it is."""
    return f"{json.dumps(GOOD)[:-1]}, {raw}}}".encode()


def _bodies() -> Iterator[BadRequest]:
    for name, body, says in (
        ("an empty body", b"", "JSON"),
        ("no JSON", b"hello", "JSON"),
        ("half of a body", b'{"model": "tiny", "prompt": "a', "JSON"),
        ("two objects", b"{}{}", "JSON"),
        ("a byte order mark", b"\xef\xbb\xbf{}", "BOM"),
        ("invalid UTF-8", b'{"model": "tiny", "prompt": "\xff\xfe"}', "UTF-8"),
        ("a surrogate in UTF-8", b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', "UTF-8"),
        ("UTF-16", json.dumps(GOOD).encode("utf-16"), "UTF-8"),
        ("a compressed body", b"\x1f\x8b\x08\x00", "UTF-8"),
        ("NaN", _with('"top_p": NaN'), "NaN"),
        ("Infinity", _with('"top_p": Infinity'), "Infinity"),
        ("minus Infinity", _with('"top_p": -Infinity'), "-Infinity"),
        ("too many digits", _with('"n": 1' + "0" * 5000), "digits"),
        ("deep lists", _with('"metadata": {"a": ' + "[" * 5000 + "]" * 5000 + "}"), "deeply"),
        ("deep objects", b'{"a":' * 5000 + b"1" + b"}" * 5000, "deeply"),
        ("a field twice", _with('"model": "acme"'), "'model'"),
        ("an inner field twice", _with('"logit_bias": {"1": 1, "1": 2}'), "'1'"),
        (
            "a hundred thousand fields",
            json.dumps({str(number): 1 for number in range(80_000)}).encode(),
            "80000 fields",
        ),
    ):
        yield BadRequest(name, body, "invalid_json", None, says=says)
    for body in (b"[]", b"null", b"1", b'"text"', b"true"):
        yield BadRequest(f"{body.decode()} is no object", body, "invalid_type", None, says="object")
    yield BadRequest(
        "a body too large",
        {**GOOD, "prompt": "a" * MAX_REQUEST_BYTES},
        "request_too_large",
        None,
        status=413,
        says=str(MAX_REQUEST_BYTES),
    )
    yield BadRequest(
        "an unknown field", {**GOOD, "max_new_tokens": 5}, "unknown_parameter", "max_new_tokens"
    )
    yield BadRequest(
        "an unknown inner field",
        {**GOOD, "stream": True, "stream_options": {"include": True}},
        "unknown_parameter",
        "stream_options.include",
    )


def _models() -> Iterator[BadRequest]:
    for path, good in (COMPLETIONS, GOOD), (CHAT, GOOD_CHAT):
        without = {key: value for key, value in good.items() if key != "model"}
        missing = "missing_required_parameter"
        yield BadRequest("no model", without, missing, "model", path)
        yield BadRequest("null for a model", {**good, "model": None}, "invalid_type", "model", path)
        yield BadRequest("an empty model", {**good, "model": ""}, "invalid_value", "model", path)
        yield BadRequest("a number as model", {**good, "model": 1}, "invalid_type", "model", path)
        yield BadRequest(
            "half a character as model", {**good, "model": "\ud800"}, "invalid_value", "model", path
        )
        yield BadRequest(
            "a huge model name", {**good, "model": "a" * 5000}, "invalid_value", "model", path
        )
        for name in ("nobody", "../acme", "acme/", "ACME", "base"):
            body = {**good, "model": name}
            yield BadRequest(
                f"the unknown model {name}", body, "model_not_found", "model", path, 404, repr(name)
            )


def _prompts() -> Iterator[BadRequest]:
    without = {key: value for key, value in GOOD.items() if key != "prompt"}
    yield BadRequest("no prompt", without, "missing_required_parameter", "prompt")
    for prompt in (None, 1, True, {}, [], [1, "a"], [[1], "a"], [1.0], [True], [None], [["a"]]):
        body = {**GOOD, "prompt": prompt}
        yield BadRequest(f"the prompt {prompt}", body, "invalid_type", "prompt")
    for prompt, param in (
        ("", "prompt"),
        ([""], "prompt"),
        ([[]], "prompt"),
        (["a", ""], "prompt[1]"),
        ([-1], "prompt"),
        ([VOCAB_SIZE], "prompt"),
        ([10**30], "prompt"),
        ([[1], [2, VOCAB_SIZE]], "prompt[1]"),
        ("\ud800", "prompt"),
        (["a", "\udfff"], "prompt"),
    ):
        body = {**GOOD, "prompt": prompt}
        yield BadRequest(f"the prompt {prompt!a}", body, "invalid_value", param)
    for name, fields, param in (
        ("an over-long prompt", {"prompt": "a " * 2000}, "prompt"),
        ("over-long token ids", {"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        ("an over-long second prompt", {"prompt": ["a", "a " * 2000]}, "prompt[1]"),
        ("too many new tokens", {"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ("far too many", {"max_tokens": 10**30}, "max_tokens"),
        ("one too many", {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
    ):
        body = {**GOOD, **fields}
        yield BadRequest(name, body, "context_length_exceeded", param, says=str(MAX_MODEL_LEN))
    yield BadRequest(
        "128 answers for each of 1000 prompts",
        {**GOOD, "prompt": ["a"] * 1000, "n": 128},
        "invalid_value",
        "n",
        says="128000",
    )
    yield BadRequest(
        "too many prompts", {**GOOD, "prompt": ["a"] * 2000}, "invalid_value", "prompt"
    )


def _ranges() -> Iterator[BadRequest]:
    for field, values in {
        "max_tokens": [-1],
        "temperature": [-0.1, 2.1, 1000],
        "top_p": [0, -0.5, 1.01],
        "top_k": [-2],
        "min_p": [-0.1, 1.1],
        "n": [0, -1, 129, 10**6],
        "best_of": [0],
        "seed": [2**63, -(2**63) - 1],
        "repetition_penalty": [0, -1, 101],
        "presence_penalty": [-2.1, 2.1],
        "frequency_penalty": [-2.1, 2.1],
        "min_tokens": [-1, 9],
        "logprobs": [-1, 21],
    }.items():
        for value in values:
            yield BadRequest(f"{field} {value}", {**GOOD, field: value}, "invalid_value", field)
    for field in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
        raw = _with(f'"{field}": 1e999')
        if field == "temperature":
            raw = raw.replace(b'"temperature": 0, ', b"")
        yield BadRequest(f"{field} beyond all numbers", raw, *_finite(field))
    yield BadRequest("other than n", {**GOOD, "best_of": 3, "n": 2}, "unsupported_value", "best_of")
    yield BadRequest(
        "stream_options alone",
        {**GOOD, "stream_options": {"include_usage": True}},
        "invalid_value",
        "stream_options",
    )


def _finite(field: str) -> tuple[str, str]:
    return "invalid_value", field


def _types() -> Iterator[BadRequest]:
    wrong: dict[str, list[Any]] = {
        "max_tokens": ["8", 8.0, 8.5, True, [8], {}],
        "temperature": ["1", True, [], {}],
        "top_p": ["1", False],
        "top_k": ["1", 1.0],
        "min_p": ["0"],
        "n": ["1", 1.0, True],
        "seed": ["1", 1.5],
        "repetition_penalty": ["1"],
        "presence_penalty": ["0"],
        "frequency_penalty": ["0"],
        "logit_bias": [[], "1", 1],
        "stop": [1, {}, True],
        "stop_token_ids": [1, "1", {}],
        "include_stop_str_in_output": ["yes", 1],
        "min_tokens": ["1", 1.0],
        "ignore_eos": ["true", 1],
        "skip_special_tokens": ["true"],
        "add_special_tokens": [1],
        "stream": ["true", 1],
        "stream_options": [True, []],
        "echo": ["true", 1],
        "logprobs": [True, "1"],
        "best_of": ["1"],
        "user": [1],
        "metadata": [1],
        "store": ["no"],
    }
    for field, values in wrong.items():
        for value in values:
            yield BadRequest(f"{field} {value!r}", {**GOOD, field: value}, "invalid_type", field)
    for field, value in {"suffix": "end", "response_format": {"type": "json_object"}}.items():
        kind = "unsupported_parameter" if field == "suffix" else "unsupported_value"
        yield BadRequest(field, {**GOOD, field: value}, kind, field)


def _lists() -> Iterator[BadRequest]:
    for name, field, value, param in (
        ("an empty stop string", "stop", "", "stop[0]"),
        ("an empty stop string in a list", "stop", ["a", ""], "stop[1]"),
        ("a stop string too long", "stop", "a" * 1001, "stop[0]"),
        ("too many stop strings", "stop", ["a"] * 17, "stop"),
        ("a million stop strings", "stop", ["a"] * 100_000, "stop"),
        ("half a character to stop at", "stop", ["\udc00"], "stop[0]"),
        ("too many stop tokens", "stop_token_ids", [1] * 129, "stop_token_ids"),
        ("a negative stop token", "stop_token_ids", [5, -1], "stop_token_ids[1]"),
        ("a stop token out of range", "stop_token_ids", [VOCAB_SIZE], "stop_token_ids"),
        ("a huge stop token", "stop_token_ids", [10**30], "stop_token_ids"),
        ("a biased token out of range", "logit_bias", {str(VOCAB_SIZE): 1}, "logit_bias"),
        ("a biased token below zero", "logit_bias", {"-1": 1}, "logit_bias"),
        ("a biased word", "logit_bias", {"red": 1}, "logit_bias"),
        ("a biased fraction", "logit_bias", {"1.0": 1}, "logit_bias"),
        ("a biased token in other digits", "logit_bias", {"\u0661": 1}, "logit_bias"),
        ("a bias too large", "logit_bias", {"1": 101}, "logit_bias.1"),
        ("a bias too small", "logit_bias", {"1": -101}, "logit_bias.1"),
        ("too many biases", "logit_bias", {str(n): 1 for n in range(1025)}, "logit_bias"),
    ):
        yield BadRequest(name, {**GOOD, field: value}, "invalid_value", param)
    yield BadRequest("a word in stop", {**GOOD, "stop": ["a", 1]}, "invalid_type", "stop[1]")
    yield BadRequest(
        "a stop token in words",
        {**GOOD, "stop_token_ids": ["1"]},
        "invalid_type",
        "stop_token_ids[0]",
    )
    yield BadRequest(
        "a bias in words", {**GOOD, "logit_bias": {"1": "a"}}, "invalid_type", "logit_bias.1"
    )


def _chats() -> Iterator[BadRequest]:
    def row(name: str, code: str, param: str, /, **fields: Any) -> BadRequest:
        return BadRequest(f"{name} in a chat", {**GOOD_CHAT, **fields}, code, param, CHAT)

    def message(name: str, code: str, param: str, /, **fields: Any) -> BadRequest:
        messages = [{"role": "user", "content": "Hi"} | fields]
        return row(name, code, f"messages[0]{param}", messages=messages)

    yield row("no messages", "invalid_value", "messages", messages=[])
    yield row("null messages", "invalid_type", "messages", messages=None)
    yield row("text for messages", "invalid_type", "messages", messages="Hi")
    yield row("text for a message", "invalid_type", "messages[0]", messages=["Hi"])
    yield row("300,000 wrong messages", "invalid_type", "messages[0]", messages=[1] * 300_000)
    yield row(
        "no role", "missing_required_parameter", "messages[0].role", messages=[{"content": ""}]
    )
    yield row(
        "no content",
        "missing_required_parameter",
        "messages[0].content",
        messages=[{"role": "user"}],
    )
    yield row(
        "an over-long conversation",
        "context_length_exceeded",
        "messages",
        messages=[{"role": "user", "content": "a " * 2000}],
    )
    yield message("an unknown role", "unsupported_value", ".role", role="wizard")
    yield message("a tool's role", "unsupported_value", ".role", role="tool")
    yield message("a number as role", "invalid_type", ".role", role=1)
    yield message("null content", "invalid_type", ".content", content=None)
    yield message("half a character", "invalid_value", ".content", content="\ud800")
    yield message("half a character as name", "invalid_value", ".name", name="\ud800")
    yield message("tool calls", "unsupported_parameter", ".tool_calls", tool_calls=[{"id": "1"}])
    yield message("an unknown field of a message", "unknown_parameter", ".mood", mood="good")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    yield message("an image", "unsupported_value", ".content", content=[image])
    yield message("text without text", "invalid_type", ".content", content=[{"type": "text"}])
    yield message("no parts", "invalid_type", ".content", content=[])
    tool = {"type": "function", "function": {"name": "f"}}
    for field, value in {
        "tools": [tool],
        "functions": [tool["function"]],
        "audio": {"voice": "alloy"},
        "web_search_options": {"user_location": None},
    }.items():
        yield row(field, "unsupported_parameter", field, **{field: value})
    yield row(
        "json_schema", "unsupported_value", "response_format", response_format={"type": "json"}
    )
    yield row("required tools", "invalid_value", "tool_choice", tool_choice="required")
    yield row("top_logprobs alone", "invalid_value", "top_logprobs", top_logprobs=2)
    yield row("21 top_logprobs", "invalid_value", "top_logprobs", logprobs=True, top_logprobs=21)
    yield row("a number of logprobs", "invalid_type", "logprobs", logprobs=2)
    yield row("no new tokens", "invalid_value", "max_tokens", max_tokens=0)
    yield row("two limits", "invalid_value", "max_tokens", max_completion_tokens=5)
    yield BadRequest(
        "more than the context in a chat",
        {"model": BASE, "messages": GOOD_CHAT["messages"], "max_completion_tokens": 5000},
        "context_length_exceeded",
        "max_completion_tokens",
        CHAT,
    )
    yield row("a prompt", "unknown_parameter", "prompt", prompt="Hi")
    yield row("echo", "unknown_parameter", "echo", echo=True)
