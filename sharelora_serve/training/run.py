"""One training run: a base, the rows it learns from, and the folder that the adapter goes to."""

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sharelora_serve.config import EMBEDDED_MODEL_ID, ServeConfig
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.source import base_folder
from sharelora_serve.training.card import DataSource, write_card
from sharelora_serve.training.data import Row, Template, hold_out, read_rows
from sharelora_serve.training.export import export
from sharelora_serve.training.factors import add_factors
from sharelora_serve.training.settings import TrainSettings, check_settings
from sharelora_serve.training.trainer import Progress, Trained, Trainer


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of the data, to try the adapter with.

    line  of the data, where it stands
    """

    text: str
    prompt_ids: list[int]
    num_answer_tokens: int
    line: int


class Run:
    """Reads the data at once, so that nothing is trained if a line of it is wrong."""

    def __init__(
        self,
        model: str | None,
        data: Path,
        output: Path,
        settings: TrainSettings,
        template: Template | None,
        num_held_out: int,
    ) -> None:
        """`model` is a folder, a hub id or None for the embedded base.

        Raises ConfigurationError for data and settings that are wrong, UnsupportedModelError.
        """
        self._folder = base_folder(model)
        config = load_model_config(self._folder)
        self._base = ServeConfig(model=model).base_name
        self._base_id = model or EMBEDDED_MODEL_ID
        self._layout = config.layout(self._base)
        check_settings(settings, self._layout, config.max_model_len)
        max_length = settings.max_length or config.max_model_len
        self._settings = replace(settings, max_length=max_length)
        self._data, self._output, self._template = data, output, template
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        rows = read_rows(data, self._tokenizer, max_length, template)
        self._rows, self._held_out = hold_out(rows, num_held_out, settings.seed)
        self._digest = hashlib.sha256(data.read_bytes()).hexdigest()

    @property
    def checkpoints(self) -> Path:
        """Where the run's state is kept until the adapter is written.

        The dot hides it from a server that watches the folder.
        """
        return self._output.with_name(f".{self._output.name}.checkpoint")

    def train(
        self,
        *,
        save_every: int,
        evaluate_every: int,
        resume: bool,
        stop: threading.Event,
        report: Callable[[Progress], None],
    ) -> Trained:
        """Take the steps, or those that are left; see Trainer.train."""
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        self._base_digest = _digest(model.parameters())
        self._factors = add_factors(model, self._layout, self._settings)
        trainer = Trainer(
            model, self._factors, self._rows, self._held_out, self._settings, self._identity()
        )
        self._trained = trainer.train(
            self.checkpoints,
            save_every=save_every,
            evaluate_every=evaluate_every,
            resume=resume,
            stop=stop,
            report=report,
        )
        return self._trained

    def write(
        self, dtype: torch.dtype, data_name: str | None, licence: str | None, command: str
    ) -> None:
        """Write the adapter, stored as dtype, and its card; the checkpoint goes then.

        Raises ConfigurationError if the factors do not fit dtype, FileExistsError, OSError.
        """
        adapter = export(
            self._factors, self._layout, self._settings, self._base_id, self._output, dtype
        )
        source = DataSource(
            file=self._data,
            digest=self._digest,
            num_rows=len(self._rows),
            num_held_out=len(self._held_out),
            template=self._template,
            name=data_name,
            licence=licence,
        )
        write_card(
            self._output, self._layout, self._settings, source, self._trained,
            adapter.num_bytes, command,
        )  # fmt: skip
        shutil.rmtree(self.checkpoints)

    def question(self) -> Question:
        """One of the held-out rows, or of all if none is held out."""
        row: Row = (self._held_out or self._rows)[0]
        prompt_ids = list(row.prompt_ids)
        text = str(self._tokenizer.decode(prompt_ids, skip_special_tokens=True))
        return Question(text.strip(), prompt_ids, len(row.answer_ids), row.line)

    def _identity(self) -> dict[str, Any]:
        """What decides the weights, as a checkpoint keeps it in JSON."""
        settings = asdict(self._settings)
        method = settings.pop("method")
        configuration = (self._folder / "config.json").read_bytes()
        return {
            "base": self._base,
            "configuration": hashlib.sha256(configuration).hexdigest(),
            "weights": self._base_digest,
            "rows": _digest_of_rows(self._rows),
            "held_out": _digest_of_rows(self._held_out),
            "frozen": _digest(a for a, _ in self._factors.pairs.values() if not a.requires_grad),
            **{name: _plain(value) for name, value in settings.items()},
            **{name: _plain(value) for name, value in method.items()},
        }


def _digest(parameters: Iterable[torch.Tensor]) -> str:
    """Tells frozen ones apart: a base or an adapter may have changed under its name."""
    digest = hashlib.sha256()
    for parameter in {id(parameter): parameter for parameter in parameters}.values():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _digest_of_rows(rows: Sequence[Row]) -> str:
    """Tells the data apart, and what template and tokenizer make of it."""
    tokens = [(row.prompt_ids, row.answer_ids) for row in rows]
    return hashlib.sha256(repr(tokens).encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
