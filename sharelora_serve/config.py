"""Every setting of a server in one place: flags, environment variables, help and defaults.

A setting is taken from the command line, else from the environment variable SHARELORA_<NAME>,
else from its default here. The CLI's options and the tables of docs/operations.md come from
ServeConfig's fields.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sharelora_serve.errors import ConfigurationError

ENV_PREFIX = "SHARELORA_"
EMBEDDED_MODEL_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_MODEL_ID = f"HuggingFaceTB/{EMBEDDED_MODEL_NAME}"  # on the hub

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


def parse_bytes(size: object) -> object:
    """A size such as '512MiB', '1.5GB' or '4096' as whole bytes; what is no string is returned.

    Raises ValueError for a string that is not a size.
    """
    if not isinstance(size, str):
        return size
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
    if matched is None or matched[2].upper() not in _UNITS:
        raise ValueError("should be a number of bytes, with a unit if wanted, such as 512MiB")
    return int(float(matched[1]) * _UNITS[matched[2].upper()])


def format_bytes(num_bytes: int) -> str:
    """Bytes in the largest binary unit that keeps the number above one: 536870912 is 512MiB."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + unit


def num_physical_cores() -> int:
    """Physical cores that this process may use: hyper-threads count once, CPU quotas are kept."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux: no masks and no quotas to read
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    quota_file = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "max 100000" or "200000 100000"
    quota, _, period = (quota_file.read_text() if quota_file.is_file() else "max").partition(" ")
    if quota.strip() == "max":
        return len(cores)
    return max(1, min(len(cores), int(quota) // int(period)))


Size = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class ServeConfig(BaseSettings):
    """The settings of one server, checked and unchangeable.

    Made with keyword arguments; what is not given is read from the environment. Sizes are in
    bytes and may be given as strings such as '512MiB'. Raises ConfigurationError, which lists
    every wrong setting with its value and what it should have been.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True
    )

    model: str | None = Field(
        None,
        description="Base model: a Hugging Face folder or hub id, such as "
        f"meta-llama/Llama-3.2-1B-Instruct; without it the embedded {EMBEDDED_MODEL_NAME} serves.",
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        description="Name by which clients ask for the base, such as llama; without it the last "
        "part of --model.",
    )
    adapters: Path | None = Field(
        None,
        description="Folder whose subfolders are adapters, such as ./adapters; each is served "
        "under its subfolder's name, changes within two seconds. Without it what the store holds "
        "is served.",
    )
    store: Path | None = Field(
        None,
        description="Folder for what was published, such as /var/lib/sharelora; a restart finds "
        "it there. Without it a folder of the base's name in "
        "$XDG_DATA_HOME/sharelora-serve, else ~/.local/share/sharelora-serve.",
    )
    adapter_versions: int = Field(
        10,
        ge=1,
        description="Versions kept of each adapter, such as 10, to roll back to; older ones are "
        "deleted.",
    )
    max_adapter_bytes: Size = Field(
        512 * 1024**2,
        description="Largest upload of an adapter, and what it may unpack to, such as 512MiB; "
        "larger ones get a 413.",
    )
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on, such as 0.0.0.0 for every interface; the default "
        "answers this machine only.",
    )
    port: int = Field(
        8000, ge=0, le=65535, description="TCP port, such as 8000; 0 takes one that is free."
    )
    api_keys: Path | None = Field(
        None,
        description="File of API keys that sharelora-serve keys create makes, such as "
        "./keys.jsonl; every request but /health and /ready then needs one. Without it whoever "
        "reaches the port may use and change everything.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto is cuda where there is one, else cpu."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Type of base weights, KV cache and, unless --adapter-dtype says otherwise, "
        "adapters; auto is the checkpoint's own on CUDA, and on a CPU that multiplies bfloat16 "
        "(AMX or AVX-512) if it is that; else float16 on a CPU that can pack it. float32 is exact, "
        "and the slowest: on CUDA it has no fast attention.",
    )
    kernels: Literal["auto", "cpu", "cuda", "reference"] = Field(
        "auto",
        description="Kernels: cpu is the compiled ones for processors, cuda those of NVIDIA GPUs, "
        "reference is plain torch, slower and for any device; auto is the fastest that the device "
        "has.",
    )
    merge: str = Field(
        "off",
        min_length=1,
        description="Adapter to fold into the base's weights, such as acme-support: it then costs "
        "what the base costs, the others are still served. auto folds the one that has nearly all "
        "of the traffic, while it has; off folds none.",
    )
    adapter_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="Type of adapters on the device: int8 holds twice as many as float16, with "
        "what an adapter adds off by about 1 %, and refuses one of which it would change a rank "
        "row by a tenth; auto is --dtype.",
    )
    adapter_memory: Size = Field(
        512 * 1024**2,
        description="Device memory for adapters, such as 512MiB; the least recently used leave "
        "first.",
    )
    adapter_host_memory: Size = Field(
        2 * 1024**3,
        description="Host memory for adapters that have left the device, such as 2GiB; what does "
        "not fit is read from disk again.",
    )
    kv_memory: Size = Field(
        1024**3,
        description="Device memory for the keys and values of running requests and the prefix "
        "cache, such as 1GiB; when it runs out, requests are computed again later: the newest of "
        "whoever was served most.",
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Longest prompt and answer together, in tokens, such as 2048; without it the "
        "model's own context, or what the KV cache holds if that is less.",
    )
    max_running: int = Field(
        64, ge=1, description="Requests in the running batch, such as 64; the others wait."
    )
    max_batch_tokens: int = Field(
        512,
        ge=1,
        description="Tokens computed in one step over all requests, such as 512; more is faster "
        "for long prompts, less lets running requests wait for shorter times.",
    )
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        description="Prompt tokens per step while other requests decode, such as 24; less keeps "
        "their streams smoother, more brings the new request's first token sooner. Without it 20, "
        "or twice as many as decode, on a CPU, and all of --max-batch-tokens on CUDA.",
    )
    speculative_tokens: int | None = Field(
        None,
        ge=0,
        description="Tokens guessed ahead in a step, such as 7, from what a stream's own text says "
        "after the same words; they are checked in the same step, so answers stay what they are. "
        "With 7 a step of fewer than 8 rows is filled up to 8; 0 guesses none. Without it as many "
        "as cost a CPU little: 7 in bfloat16 that it multiplies, else 3; on CUDA, whose recorded "
        "steps have none, 0.",
    )
    max_queue: int = Field(
        1024,
        ge=1,
        description="Requests that may wait, such as 1024; then the newest of whoever has most of "
        "them waiting gets a 429.",
    )
    max_first_token_seconds: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds within which a request must start, such as 6; one that would not, at "
        "the pace at which its tenant's last ones started, gets a 429 at once. Without it requests "
        "wait as long as --max-queue lets them.",
    )
    max_request_bytes: Size = Field(
        4 * 1024**2, description="Largest request body, such as 4MiB; larger ones get a 413."
    )
    prefix_cache: bool = Field(
        True,
        description="Keep the keys and values of finished prompts for requests to the same "
        "adapter that begin alike; they use only --kv-memory that nothing else needs.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Compute threads on a CPU, such as 8; without it one per physical core that "
        "the process may use.",
    )
    drain_seconds: float = Field(
        8.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that open requests may go on after the signal to stop, such as 8; "
        "what is left then fails. Docker kills a container after 10, Kubernetes a pod after 30.",
    )
    drain_delay_seconds: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after that signal in which /ready is answered with 503 even if no "
        "request is open, such as 3: longer than a load balancer takes between two looks.",
    )
    metrics_adapters: int = Field(
        100,
        ge=0,
        description="Adapters that /metrics counts by name, the most used ones, such as 100; all "
        "others are counted together.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages to log."
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="Lines of the log: text for people, json for one object a line with time, "
        "level, logger, message and fields.",
    )

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - checked by the fields
        """Check and keep the settings; see the class."""
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigurationError(_describe(error)) from None

    @field_validator("adapters")
    @classmethod
    def _adapters_is_a_folder(cls, adapters: Path | None) -> Path | None:
        if adapters is not None and not adapters.is_dir():
            raise ValueError("should be an existing folder whose subfolders are adapters")
        return adapters

    @field_validator("api_keys")
    @classmethod
    def _api_keys_is_a_file(cls, api_keys: Path | None) -> Path | None:
        if api_keys is not None and not api_keys.is_file():
            raise ValueError(
                "should be an existing file; sharelora-serve keys create --admin makes it"
            )
        return api_keys

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        problems = []
        if self.kernels == "cpu" and self.device == "cuda":
            problems.append("kernels = 'cpu': should be auto or reference with device = 'cuda'")
        if self.kernels == "cuda" and self.device == "cpu":
            problems.append(
                "kernels = 'cuda': should be auto, cpu or reference with device = 'cpu'"
            )
        if self.max_running > self.max_batch_tokens:
            problems.append(
                f"max_batch_tokens = {self.max_batch_tokens}: should be at least max_running = "
                f"{self.max_running}, since every running request needs a token per step"
            )
        if self.prefill_chunk is not None and self.prefill_chunk > self.max_batch_tokens:
            problems.append(
                f"prefill_chunk = {self.prefill_chunk}: should be at most max_batch_tokens = "
                f"{self.max_batch_tokens}"
            )
        if self.drain_delay_seconds > self.drain_seconds:
            problems.append(
                f"drain_delay_seconds = {self.drain_delay_seconds:g}: should be at most "
                f"drain_seconds = {self.drain_seconds:g}, which is all the time there is"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def base_name(self) -> str:
        """The name under which the base is served."""
        if self.model_name is not None:
            return self.model_name
        if self.model is None:
            return EMBEDDED_MODEL_NAME
        folder = Path(self.model)
        return folder.resolve().name if folder.is_dir() else folder.name

    @property
    def store_folder(self) -> Path:
        """The folder of the durable store."""
        if self.store is not None:
            return self.store
        data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        return data / "sharelora-serve" / re.sub(r"[^\w.-]", "_", self.base_name)

    @property
    def merged_adapter(self) -> str | None:
        """The adapter that merge names, folded in for good."""
        return None if self.merge in ("off", "auto") else self.merge

    @property
    def num_threads(self) -> int:
        """Compute threads to use on a CPU."""
        return self.threads if self.threads is not None else num_physical_cores()


def flag(setting: str) -> str:
    """The command line option of a setting: adapter_memory is --adapter-memory."""
    return "--" + setting.replace("_", "-")


def environment_variable(setting: str) -> str:
    """The environment variable of a setting: adapter_memory is SHARELORA_ADAPTER_MEMORY."""
    return ENV_PREFIX + setting.upper()


def default_text(setting: str) -> str:
    """A setting's default as a user would write it; empty where there is none."""
    field = ServeConfig.model_fields[setting]
    if field.default is None:
        return ""
    if any(isinstance(item, BeforeValidator) for item in field.metadata):
        return format_bytes(field.default)
    if field.annotation is float:
        return f"{field.default:g}"
    return "on" if field.default is True else str(field.default)


def value_text(setting: str) -> str:
    """What kind of value a setting takes: 'auto|cpu|cuda', SIZE, INTEGER, NUMBER, PATH or TEXT."""
    field = ServeConfig.model_fields[setting]
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    if any(isinstance(item, BeforeValidator) for item in field.metadata):
        return "SIZE"
    if field.annotation is bool:
        return "on|off"
    if field.annotation in (int, int | None):
        return "INTEGER"
    if field.annotation in (float, float | None):
        return "NUMBER"
    return "PATH" if field.annotation == Path | None else "TEXT"


def _describe(error: ValidationError) -> str:
    """One line per wrong setting: its name, its value and what it should have been."""
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if problem["type"] == "extra_forbidden":
            message = f"no such setting; there are {', '.join(ServeConfig.model_fields)}"
        if problem["loc"]:
            lines.append(f"{problem['loc'][0]} = {problem['input']!s:.200}: {message}")
        else:  # found by _settings_agree, which names settings and values itself
            lines.extend(message.splitlines())
    return f"{len(lines)} wrong setting{'s' * (len(lines) > 1)}\n" + "\n".join(
        f"  {line}" for line in lines
    )
