"""The requests of /v1/completions and /v1/chat/completions: their fields and their ranges.

OpenAI's fields, and vLLM's names for what OpenAI's lack. A field that is not known is refused by
name, so no parameter is ever silently without effect; the few of OpenAI's that rightly have none
here are listed as such. `null` means not given.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
)
from pydantic_core import PydanticCustomError

from sharelora_serve.engine.request import SamplingParams
from sharelora_serve.server.errors import Problem, shortened

MAX_CHOICES = 128
"""Largest n, as OpenAI's."""
MAX_MODEL_LENGTH = 1_000
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1_000
"""Characters of one stop string; all of them are looked at for every token."""
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1_024
MAX_TOKEN_DIGITS = 10
MAX_SEED = 2**63 - 1


def _refuse_unless_empty(value: object) -> None:
    # Clients send empty values for what they do not use; `== 0` would also let 0 through.
    if value is not None and value is not False and value not in ("", [], {}):
        raise PydanticCustomError(
            "unsupported_parameter", "is not supported by this server; remove it"
        )


def _encodable(text: str) -> str:
    # JSON can hold half a surrogate pair, which is no text and no tokenizer takes.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"should be Unicode text ({error.reason})") from None
    return text


def _string_or_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _completion_prompts(value: object) -> list[str] | list[list[int]]:
    """One prompt or several, as text or as token ids, always as a list of prompts."""
    if isinstance(value, str):
        return [_encodable(value)]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return [_encodable(item) for item in value]
        if all(type(item) is int for item in value):  # a bool is an int to isinstance
            return [value]
        if all(isinstance(item, list) for item in value) and all(
            type(token) is int for item in value for token in item
        ):
            return value
    raise PydanticCustomError(
        "invalid_type",
        "should be a string, a list of strings, a list of token ids or a list of such lists, "
        "and not empty",
    )


def _message_text(content: object) -> str:
    """The text of a message: a string, or text parts joined with newlines (as vLLM does)."""
    if isinstance(content, str):
        return _encodable(content)
    if not isinstance(content, list) or not content:
        raise PydanticCustomError("invalid_type", "should be a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None:
            message = f'[{index}] should be {{"type": "text", "text": ...}}'
            raise PydanticCustomError("invalid_type", "{message}", {"message": message})
        if kind != "text":
            message = f"[{index}] is of type {shortened(kind)}; this model reads text parts only"
            raise PydanticCustomError("unsupported_value", "{message}", {"message": message})
        if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            message = f'[{index}] should have "type" and a string "text", and nothing else'
            raise PydanticCustomError("invalid_type", "{message}", {"message": message})
        texts.append(_encodable(part["text"]))
    return "\n".join(texts)


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages; `developer` is OpenAI's newer word for `system`."""


def _message_role(role: object) -> str:
    if not isinstance(role, str):
        raise PydanticCustomError("invalid_type", "should be a string")
    if role not in ROLES:
        message = f"{shortened(role)} is not a role of this server; should be {', '.join(ROLES)}"
        raise PydanticCustomError("unsupported_value", "{message}", {"message": message})
    return ROLES[role]


def _text_only(value: object) -> None:
    if value is not None and value not in ({"type": "text"}, ["text"]):
        message = f"{shortened(value)} is not supported; this server answers in plain text only"
        raise PydanticCustomError("unsupported_value", "{message}", {"message": message})


Unsupported = Annotated[None, BeforeValidator(_refuse_unless_empty)]
TextOnly = Annotated[None, BeforeValidator(_text_only)]
StopString = Annotated[
    str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_encodable)
]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
GivenPrompts = str | list[str] | list[int] | list[list[int]]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    """`stream_options`: whether the last chunk tells how many tokens were used."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against traffic analysis; none here


class GenerationFields(_Fields):
    """What both routes take. Ranges are OpenAI's, else vLLM's."""

    model: Annotated[
        str, Field(min_length=1, max_length=MAX_MODEL_LENGTH), AfterValidator(_encodable)
    ]
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # vLLM's clients write -1 or 0 for all
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=MAX_LOGIT_BIASES)
    stop: Annotated[
        StopStrings | None, BeforeValidator(_string_or_list, str | StopStrings | None)
    ] = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # OpenAI's that rightly have no effect here: labels, billing and storage on their side.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1

    @property
    def num_prompts(self) -> int:
        """Prompts, each of which gets its own answers."""
        return 1

    @property
    def new_tokens(self) -> int | None:
        """The limit on new tokens that the client gave."""
        return self.max_tokens

    @property
    def new_tokens_param(self) -> str:
        """The field that gave it."""
        return "max_tokens"

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no logprobs at all."""

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's logprobs are part of the answer."""
        return False

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def disagreements(self) -> Iterator[Problem]:
        """Problems between fields that are right by themselves."""
        if self.stream_options is not None and not self.stream:
            yield Problem("stream_options", "invalid_value", "needs stream to be true")
        if self.new_tokens is not None and (self.min_tokens or 0) > self.new_tokens:
            message = f"should be at most the {self.new_tokens} new tokens asked for"
            yield Problem("min_tokens", "invalid_value", f"{message}, not {self.min_tokens}")
        for token in self.logit_bias or {}:
            if not (token.isascii() and token.isdecimal() and len(token) <= MAX_TOKEN_DIGITS):
                message = f"keys should be token ids in decimal digits, not {shortened(token)}"
                yield Problem("logit_bias", "invalid_value", message)

    def too_many(self, most: int) -> Iterator[Problem]:
        """The problem of more answers, over all prompts, than `most`."""
        prompts, choices = self.num_prompts, self.num_choices
        if prompts * choices > most:
            message = (
                f"{prompts} prompts with {choices} answers each are {prompts * choices}, but one "
                f"request gets at most {most} answers (--max-queue); send several requests"
            )
            yield Problem("prompt" if prompts > most else "n", "invalid_value", message)

    def tokens_out_of_range(self, vocab_size: int) -> Iterator[Problem]:
        """Problems of token ids that the model does not have."""
        for param, token_ids in (
            ("stop_token_ids", self.stop_token_ids or []),
            ("logit_bias", [int(token) for token in self.logit_bias or {}]),
        ):
            if wrong := [token for token in token_ids if token >= vocab_size]:
                yield out_of_range(param, wrong, vocab_size)

    def sampling(self, *, max_tokens: int, choice: int) -> SamplingParams:
        """What the engine is asked for answer `choice` of each prompt.

        Answer i uses seed + i, modulo 2^63, so n answers differ and each can be repeated alone.
        """
        logprobs = self.num_logprobs
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else (self.seed + choice) % (MAX_SEED + 1),
            repetition_penalty=(
                1.0 if self.repetition_penalty is None else self.repetition_penalty
            ),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=logprobs if self.wants_prompt_logprobs else None,
        )


def out_of_range(param: str, token_ids: list[int], vocab_size: int) -> Problem:
    """The problem of token ids that the model does not have."""
    message = f"token ids should be from 0 to {vocab_size - 1}, not {shortened(token_ids)}"
    return Problem(param, "invalid_value", message)


class CompletionRequest(GenerationFields):
    """The body of /v1/completions."""

    prompt: Annotated[
        list[str] | list[list[int]], PlainValidator(_completion_prompts, GivenPrompts)
    ]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    add_special_tokens: bool | None = None
    suffix: Unsupported = None
    response_format: TextOnly = None

    @property
    def num_prompts(self) -> int:
        """Prompts, each of which gets its own answers."""
        return len(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no logprobs at all."""
        return self.logprobs

    @property
    def wants_prompt_logprobs(self) -> bool:
        """The prompt's logprobs are part of an echoed prompt."""
        return bool(self.echo)

    def disagreements(self) -> Iterator[Problem]:
        """Problems between fields that are right by themselves."""
        yield from super().disagreements()
        if self.best_of is not None and self.best_of != self.num_choices:
            message = f"should equal n = {self.num_choices}, not {self.best_of}"
            yield Problem("best_of", "unsupported_value", f"{message}; ask for more with n")

    def tokens_out_of_range(self, vocab_size: int) -> Iterator[Problem]:
        """Problems of token ids that the model does not have."""
        yield from super().tokens_out_of_range(vocab_size)
        for index, prompt in enumerate(self.prompt):
            if isinstance(prompt, list):
                wrong = [token for token in prompt if not 0 <= token < vocab_size]
                if wrong:
                    param = f"prompt[{index}]" if len(self.prompt) > 1 else "prompt"
                    yield out_of_range(param, wrong, vocab_size)


class ChatMessage(_Fields):
    """One message of a conversation; an answer of this server can be sent back as it is."""

    role: Annotated[str, PlainValidator(_message_role, str)]
    content: Annotated[str, PlainValidator(_message_text, str | list[dict[str, str]])]
    name: Annotated[str, AfterValidator(_encodable)] | None = None
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None


class ChatCompletionRequest(GenerationFields):
    """The body of /v1/chat/completions."""

    # One wrong message is enough: a body has room for a million of them.
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: TextOnly = None
    modalities: TextOnly = None
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    tool_choice: Literal["none", "auto"] | None = None  # without tools both mean none
    parallel_tool_calls: bool | None = None  # likewise

    @property
    def new_tokens(self) -> int | None:
        """The limit on new tokens that the client gave, under OpenAI's newer name or the older."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def new_tokens_param(self) -> str:
        """The field that gave it."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def disagreements(self) -> Iterator[Problem]:
        """Problems between fields that are right by themselves."""
        yield from super().disagreements()
        if self.top_logprobs is not None and not self.logprobs:
            yield Problem("top_logprobs", "invalid_value", "needs logprobs to be true")
        if self.max_tokens == 0:
            yield Problem("max_tokens", "invalid_value", "should be at least 1 in a chat")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            message = f"contradicts max_completion_tokens = {self.max_completion_tokens}"
            yield Problem("max_tokens", "invalid_value", f"{message}; give only one of them")

    def conversation(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        return [
            {"role": message.role, "content": message.content}
            | ({} if message.name is None else {"name": message.name})
            for message in self.messages
        ]
