"""The command train: from a data file to an adapter's folder, and to a running server."""

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from sharelora_serve.adapters.naming import NAME_RULE, AdapterName
from sharelora_serve.cli.connection import ApiKey, connect, parse_answer
from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import progress_bar, show
from sharelora_serve.cli.published import add_adapter
from sharelora_serve.config import EMBEDDED_MODEL_NAME, environment_variable
from sharelora_serve.errors import ConfigurationError

if TYPE_CHECKING:  # slow imports, which --help need not wait for
    from sharelora_serve.training.counts import Method
    from sharelora_serve.training.data import Template
    from sharelora_serve.training.run import Run
    from sharelora_serve.training.settings import TrainSettings
    from sharelora_serve.training.trainer import Progress

_NOT_ON_THE_CARD = ("--api-key", "--publish", "--name")
_STOPPED = 130  # as a shell has it for a command that Ctrl-C ended


class Share(StrEnum):
    """The sides that all layers have in common."""

    NONE = "none"
    A = "A"
    B = "B"
    AB = "AB"


class Schedule(StrEnum):
    """How the learning rate goes after the warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class Dtype(StrEnum):
    """How an adapter's values are stored."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def train(
    data: Annotated[
        Path,
        typer.Argument(
            help="A .jsonl of messages, or of prompt and completion, or a .csv, such as "
            "questions.jsonl; the loss is on answers alone."
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(help="Folder to write, such as adapters/acme-support; it must not exist."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base to adapt: a Hugging Face folder or hub id; without it the embedded "
            f"{EMBEDDED_MODEL_NAME}.",
            envvar=environment_variable("model"),
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            help='What is asked of a row with other fields, such as "Intent of: {text}"; a CSV '
            "needs it."
        ),
    ] = None,
    assistant: Annotated[
        str | None,
        typer.Option(help='What is answered to --user, such as "{category}".'),
    ] = None,
    share: Annotated[
        Share, typer.Option(help="Factors that are one matrix for all layers; none is plain LoRA.")
    ] = Share.A,
    modules: Annotated[
        str, typer.Option(help="Linear layers to adapt, such as q_proj,v_proj.")
    ] = "all-linear",
    share_only: Annotated[
        str | None,
        typer.Option(help="Modules that share, such as q,k,v; the others are plain LoRA."),
    ] = None,
    share_qkv: Annotated[
        bool, typer.Option("--share-qkv", help="One A for q, k and v together.")
    ] = False,
    freeze_a: Annotated[
        bool, typer.Option("--freeze-a", help="Train B alone; A stays as --seed draws it.")
    ] = False,
    freeze_a_from: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER_OR_SEED",
            help="Train B alone, over the A of an adapter, such as adapters/common, or the one "
            "that a seed draws, such as 7: the same for all tenants who give the same.",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rows of A, columns of B.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Scale: alpha / rank times B A. Without it twice the rank.")
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="alpha / sqrt(rank) times B A instead.")
    ] = False,
    dropout: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of a factor's inputs left out.")
    ] = 0.0,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Of AdamW, at its highest; without it what suits the form."),
    ] = None,
    schedule: Annotated[
        Schedule, typer.Option(help="How the rate falls after the warm-up.")
    ] = Schedule.LINEAR,
    warm_up: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps in which the rate rises.")
    ] = 0.05,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps to take; without it as --epochs says.")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.001, help="Times every row is learnt.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a row at most; without it the base's context."),
    ] = None,
    held_out: Annotated[
        int, typer.Option("--hold-out", min=0, help="Rows to validate on, not trained on.")
    ] = 0,
    evaluate_every: Annotated[
        int, typer.Option(min=1, help="Steps from one validation to the next.")
    ] = 50,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps from one checkpoint to the next.")
    ] = 100,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was stopped, to the same weights."),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of the rows' order, of what is held out, and of A.")
    ] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Processor threads; without it all.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="How the adapter is stored; it is trained in float32.")
    ] = Dtype.FLOAT16,
    data_name: Annotated[
        str | None, typer.Option(help="What the card calls the data, such as Banking77.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the data, for the card, such as CC-BY-4.0.")
    ] = None,
    publish: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server to publish to, such as http://127.0.0.1:8000; it is then asked for a "
            "first answer. Needs --name.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call it there, such as acme-support.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Train an adapter, ShareLoRA or LoRA, and publish it.

    It is written with a card. Checkpoints are kept beside it, in .OUTPUT.checkpoint, until then.
    """
    import torch  # slow to import, which --help need not wait for

    from sharelora_serve.training.data import make_template
    from sharelora_serve.training.settings import TrainSettings, default_learning_rate

    with one_message():
        if output.exists():
            raise ConfigurationError(f"{output} exists; remove it or give another folder")
        if (publish is None) is not (name is None):
            raise ConfigurationError("--publish and --name go together; give both or neither")
        if name is not None and AdapterName.parse(name) is None:
            raise ConfigurationError(f"--name {name!r} cannot name an adapter: {NAME_RULE}")
        if publish is not None:
            with connect(publish, api_key) as client:  # first, so that no run is in vain
                parse_answer(client.get("/v1/models"))
        freeze_a = freeze_a or freeze_a_from is not None
        chosen, method = _method(share, modules, share_only, share_qkv, freeze_a)
        source = _seed_or_path(freeze_a_from)
        settings = TrainSettings(
            modules=chosen, method=method, freeze_a_from=source, rank=rank,
            alpha=2.0 * rank if alpha is None else alpha, rslora=rslora, dropout=dropout,
            learning_rate=learning_rate or default_learning_rate(method, source),
            schedule=schedule.value, warm_up=warm_up,
            num_steps=steps, num_epochs=epochs, batch_size=batch_size, seed=seed,
            max_length=max_length,
        )  # fmt: skip
        run = _prepare(
            model, data, output, settings, make_template(user, assistant), held_out, threads
        )
        with _shown() as report, _stopped_by_signals() as stop:
            trained = run.train(
                save_every=save_every,
                evaluate_every=evaluate_every,
                resume=resume,
                stop=stop,
                report=report,
            )
        if not trained.is_complete:
            what_now = (
                f"after step {trained.num_steps}; the same command with --resume goes on"
                if trained.num_steps
                else "before the first step; nothing was kept"
            )
            typer.echo(f"Stopped {what_now}.", err=True)
            raise typer.Exit(_STOPPED)
        run.write(getattr(torch, dtype.value), data_name, licence, _command(sys.argv[1:]))
        show(
            f"Wrote {output}: {trained.num_steps} steps, {trained.tokens_per_second:.0f} "
            f"tokens/s, loss of the last {trained.curve[-1].loss:.4f}."
        )
    if publish is not None and name is not None:
        add_adapter(name, output, True, None, publish, api_key)
        with one_message():
            _ask(run, name, publish, api_key)


def _command(words: Sequence[str]) -> str:
    """The command for the card, which others read: without the key and where it was published."""
    kept, is_value = ["sharelora-serve"], False
    for word in words:
        option, equals, _ = word.partition("=")
        if option in _NOT_ON_THE_CARD:
            is_value = not equals
        elif not is_value and word != "--resume":
            kept.append(word)
        else:
            is_value = False
    return shlex.join(kept)


def _prepare(
    model: str | None,
    data: Path,
    output: Path,
    settings: "TrainSettings",
    template: "Template | None",
    num_held_out: int,
    threads: int | None,
) -> "Run":
    try:
        from sharelora_serve.training.run import Run
    except ImportError as error:
        raise ConfigurationError(
            f"training needs more packages ({error}); pip install 'sharelora-serve[train]'"
        ) from error
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return Run(model, data, output, settings, template, num_held_out)


def _method(
    share: Share, modules: str, share_only: str | None, share_qkv: bool, freeze_a: bool
) -> "tuple[tuple[str, ...], Method]":
    """The modules and how they are trained, checked to go together."""
    from sharelora_serve.adapters.layout import MODULES
    from sharelora_serve.training.counts import Method
    from sharelora_serve.training.settings import check_method
    from sharelora_serve.training.shapes import choose_modules

    chosen = choose_modules(modules, MODULES, MODULES)
    method = Method(
        share="" if share is Share.NONE else share.value,
        share_only=None if share_only is None else choose_modules(share_only, MODULES, MODULES),
        share_qkv=share_qkv,
        freeze_a=freeze_a,
    )
    check_method(method, chosen)
    return chosen, method


def _seed_or_path(text: str | None) -> int | Path | None:
    if text is None:
        return None
    return int(text) if text.isdecimal() else Path(text)


def _ask(run: "Run", name: str, url: str, api_key: str | None) -> None:
    """Put a row's prompt to the server and show what the adapter answers there."""
    question = run.question()
    body = {
        "model": name,
        "prompt": question.prompt_ids,
        "max_tokens": question.num_answer_tokens + 16,
        "temperature": 0,
    }
    with connect(url, api_key) as client:
        answer = parse_answer(client.post("/v1/completions", json=body))
    show(f"\nAsked with line {question.line} of the data:\n{question.text}")
    show(f"\n{name} answers:\n{answer['choices'][0]['text'].strip()}")


@contextmanager
def _shown() -> "Iterator[Callable[[Progress], None]]":
    """A function that shows a run's progress."""
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with progress_bar(*columns) as progress:
        task = progress.add_task("Training", total=None, figures="")
        validated = ""

        def report(now: "Progress") -> None:
            nonlocal validated
            if now.validation_loss is not None:
                validated = f", held out {now.validation_loss:.4f}"
            figures = f"loss {now.loss:.4f}{validated}, {now.tokens_per_second:.0f} tokens/s"
            progress.update(task, completed=now.step, total=now.num_steps, figures=figures)
            if progress.disable and (now.step % 10 == 0 or now.step == now.num_steps):
                typer.echo(f"step {now.step}/{now.num_steps}: {figures}", err=True)

        yield report


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM; a second one ends the process at once."""
    stop = threading.Event()
    before: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
