"""Training data: rows of a prompt and an answer, from JSONL or CSV, as tokens."""

import csv
import json
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from jinja2 import TemplateError

from sharelora_serve.errors import ConfigurationError

_MAX_LISTED = 10  # problems spelled out in one message; the rest are counted
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Template:
    """How a row of fields becomes a chat: {field} stands for what the row has there.

    user       such as "Intent of this message: {text}"
    assistant  the answer that is learnt, such as "{category}"
    """

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and the answer to it, in tokens; the loss is on the answer alone.

    line  of its file, the first being 1
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    line: int

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def make_template(user: str | None, assistant: str | None) -> Template | None:
    """None without both; ConfigurationError for one without the other."""
    if user is None and assistant is None:
        return None
    if user is None or assistant is None:
        raise ConfigurationError("--user and --assistant go together; give both or neither")
    return Template(user, assistant)


def read_rows(
    path: Path,
    tokenizer: Any,  # noqa: ANN401 - any Hugging Face tokenizer
    max_length: int,
    template: Template | None = None,
) -> list[Row]:
    """The rows of a .jsonl or .csv file, in the file's order.

    A line of JSONL has `messages`, of which the last is the assistant's answer, or `prompt` and
    `completion`, which are taken as they are, without a chat template. With a template any fields
    will do, and a CSV needs one. Every answer ends with the tokenizer's end of sequence.

    Raises ConfigurationError with every problem's line and what to do about it.
    """
    rows: list[Row] = []
    problems: list[str] = []
    try:
        for line, fields in _fields(path, template):
            try:
                if isinstance(fields, str):
                    raise ValueError(fields)
                texts = _texts(fields, tokenizer, template)
                rows.append(_encode(texts, tokenizer, max_length, line))
            except ValueError as error:
                problems.append(f"  line {line}: {error}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}; expected JSONL or CSV in UTF-8"
        ) from error
    if problems:
        count = "1 line" if len(problems) == 1 else f"{len(problems)} lines"
        listed = problems[:_MAX_LISTED]
        if len(problems) > len(listed):
            listed.append(f"  ... and {len(problems) - len(listed)} more")
        raise ConfigurationError("\n".join([f"{path} has {count} to mend:", *listed]))
    if not rows:
        raise ConfigurationError(f"{path} has no rows; give a file with at least one example")
    return rows


def _fields(path: Path, template: Template | None) -> Iterator[tuple[int, Any]]:
    """Line number and fields of every row; a text in place of fields says what is wrong."""
    if path.suffix == ".csv":
        if template is None:
            raise ConfigurationError(
                f"{path}: of a CSV it must be said what is asked and what is answered; give --user "
                'and --assistant, such as --user "Intent of: {text}" --assistant "{category}"'
            )
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from _fields_of_csv(file)
    elif path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    fields = json.loads(text)
                except ValueError as error:
                    yield number, f"is not JSON ({error}); write one object to a line"
                    continue
                is_object = isinstance(fields, dict)
                yield number, fields if is_object else "is not a JSON object; write one to a line"
    else:
        raise ConfigurationError(f"{path}: expected a name that ends with .jsonl or .csv")


def _fields_of_csv(file: TextIO) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        before = reader.line_num
        for values in reader:
            if values:
                is_whole = len(values) == len(header)
                yield (
                    before + 1,
                    dict(zip(header, values, strict=True))
                    if is_whole
                    else "has not as many columns as the header",
                )
            before = reader.line_num
    except csv.Error as error:
        yield reader.line_num, f"is not CSV ({error})"


@dataclass(frozen=True, slots=True)
class _Texts:
    """What stands before an answer, and the answer with its end.

    is_chat  written by the chat template, which holds what a tokenizer would put before a prompt
    """

    prompt: str
    answer: str
    is_chat: bool


def _texts(
    fields: Mapping[str, Any],
    tokenizer: Any,  # noqa: ANN401 - any Hugging Face tokenizer
    template: Template | None,
) -> _Texts:
    """Of a row; ValueError says what is wrong with it."""
    if template is not None:
        messages = [
            {"role": "user", "content": _fill(template.user, fields)},
            {"role": "assistant", "content": _fill(template.assistant, fields)},
        ]
        return _chat(messages, tokenizer)
    if "messages" in fields:
        return _chat(_checked_messages(fields["messages"]), tokenizer)
    if "prompt" not in fields or "completion" not in fields:
        raise ValueError(
            "has neither 'messages' nor 'prompt' and 'completion', only "
            f"{', '.join(map(repr, fields)) or 'nothing'}; rename its fields, or say with --user "
            "and --assistant what is asked and answered"
        )
    for name in ("prompt", "completion"):
        if not isinstance(fields[name], str):
            raise ValueError(f"{name!r} is {_kind(fields[name])}, expected a text")
    if not fields["completion"]:
        raise ValueError("'completion' is empty, so nothing is learnt; leave the line out")
    return _Texts(fields["prompt"], fields["completion"] + tokenizer.eos_token, is_chat=False)


class _Formatter(string.Formatter):
    """Fills in texts and numbers alone: a null or a list would be learnt as Python spells it."""

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        value, first = super().get_field(field_name, args, kwargs)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError(f"{field_name!r} is {_kind(value)}, expected a text or a number")
        return value, first


def _fill(template: str, fields: Mapping[str, Any]) -> str:
    try:
        return _Formatter().vformat(template, (), fields)
    except TypeError as error:
        raise ValueError(str(error)) from None
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"has no field {error} for {template!r}; it has {', '.join(map(repr, fields))}"
        ) from None
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(
            f"{template!r} is no template: {error}; write {{field}} for a field, and {{{{ for a {{"
        ) from None


def _checked_messages(messages: Any) -> list[dict[str, str]]:  # noqa: ANN401 - from a file
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' is {_kind(messages)}, expected a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError("a message has no text in 'content'; expected role and content")
        if message.get("role") not in _ROLES:
            raise ValueError(
                f"a message has the role {message.get('role')!r}, expected {', '.join(_ROLES)}"
            )
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's, so there is no answer to learn")
    return messages


def _kind(value: Any) -> str:  # noqa: ANN401 - from a file
    return f"{type(value).__name__} {json.dumps(value)[:40]}"


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> _Texts:  # noqa: ANN401
    """As the server's chat endpoint asks, and what it then expects to come."""
    if not messages[-1]["content"].strip():
        raise ValueError("the answer is empty, so nothing is learnt; leave the line out")
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            "the base has no chat template, so it cannot learn from messages; give 'prompt' and "
            "'completion'"
        )
    try:
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the base's chat template refuses it: {error}") from None
    if not whole.startswith(prompt):
        raise ConfigurationError(
            "the base's chat template writes an answer otherwise than it asks for one; give "
            "'prompt' and 'completion', with the template's own words"
        )
    answer, ends, _ = whole[len(prompt) :].rpartition(tokenizer.eos_token)
    learnt = (answer + ends) if ends else whole[len(prompt) :] + tokenizer.eos_token
    return _Texts(prompt, learnt, is_chat=True)


def _encode(
    texts: _Texts,
    tokenizer: Any,  # noqa: ANN401 - any Hugging Face tokenizer
    max_length: int,
    line: int,
) -> Row:
    prompt_ids = tokenizer(texts.prompt, add_special_tokens=not texts.is_chat).input_ids
    answer_ids = tokenizer(texts.answer, add_special_tokens=False).input_ids
    if not prompt_ids:
        raise ValueError("the prompt is empty; give it at least a word")
    if len(prompt_ids) + len(answer_ids) > max_length:
        raise ValueError(
            f"has {len(prompt_ids)} tokens of prompt and {len(answer_ids)} of answer, more than "
            f"{max_length}, which is --max-length or the base's context; shorten it or leave it out"
        )
    return Row(tuple(prompt_ids), tuple(answer_ids), line)


def hold_out(rows: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and at least `count` to validate on; no prompt stands in both.

    Raises ConfigurationError if nothing is left to train on.
    """
    if not count:
        return rows, []
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    random.Random(f"held out {seed}").shuffle(prompts)
    num_rows: dict[tuple[int, ...], int] = dict.fromkeys(prompts, 0)
    for row in rows:
        num_rows[row.prompt_ids] += 1
    held: set[tuple[int, ...]] = set()
    total = 0
    for prompt in prompts:
        if total >= count:
            break
        held.add(prompt)
        total += num_rows[prompt]
    trained = [row for row in rows if row.prompt_ids not in held]
    if not trained:
        raise ConfigurationError(
            f"--hold-out {count} leaves none of the {len(rows)} rows to train on; hold out fewer"
        )
    return trained, [row for row in rows if row.prompt_ids in held]
