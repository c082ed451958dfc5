"""python -m loadtest COMMAND: measures a server, or makes adapters to measure it with.

run plays a workload to any OpenAI-compatible server that runs. uploads, reloads, tiers and merging
check the answers of one: they print a table, and exit with 1 if an answer was wrong or a request
failed. gaps, memory and pool print a line of JSON about it. compare, sweep, registered, flood and
step start what they measure.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from loadtest import quick
from loadtest.merging import measure_merging
from loadtest.reloads import Plan, measure_reloads
from loadtest.report import Report
from loadtest.run import APIS, Target, prepare, read_keys, run, text
from loadtest.tiers import Load, measure_tiers
from loadtest.uploads import measure_uploads
from loadtest.workloads import KINDS, Settings
from sharelora_serve.errors import ServeError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Url = Annotated[str, typer.Option(help="Address of the server, such as http://127.0.0.1:8000.")]
Base = Annotated[str, typer.Option(help="Name of the base.")]
AdapterFolder = Annotated[Path, typer.Option(help="A folder of PEFT's or ShareLoRA's.")]
Range = Annotated[tuple[int, int], typer.Option(help="Least and most, drawn uniformly.")]
Streams = Annotated[int | None, typer.Option(min=1, help="Of a closed loop, such as 32.")]
Count = Annotated[int, typer.Option(min=1)]
Tokens = Annotated[int, typer.Option(min=2)]  # so that there is a gap between two
Rate = Annotated[
    float | None,
    typer.Option(min=0.001, help="Requests per second, open loop; with --streams only saved."),
]
DEFAULT_URL, DEFAULT_BASE = "http://127.0.0.1:8000", "SmolLM2-135M-Instruct"
BUILD = Path("build")
EXAMPLE = Path("adapters/banking77-intent")


@app.command("run")
def run_command(
    workload: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(KINDS)}.", metavar="[WORKLOAD]")
    ] = None,
    url: Url = DEFAULT_URL,
    base: Base = DEFAULT_BASE,
    api: Annotated[str, typer.Option(help=f"One of {', '.join(APIS)}.")] = "openai",
    api_key: Annotated[str | None, typer.Option(envvar="LOADTEST_API_KEY")] = None,
    tenant_keys: Annotated[
        Path | None, typer.Option(help="JSON object of tenant: API key; others use --api-key.")
    ] = None,
    streams: Streams = None,
    rate: Rate = None,
    requests: Count = 64,
    num_adapters: Annotated[int, typer.Option(min=0, help="Called t000, t001, ...")] = 0,
    cv: Annotated[float, typer.Option(min=0.01, help="Of the gaps; 1 is Poisson.")] = 1.0,
    exponent: Annotated[float, typer.Option(min=0.01, help="Of slora; 1 is uniform.")] = 1.0,
    flood: Annotated[float, typer.Option(min=1, help="Times its share, of burst's first.")] = 10.0,
    prompt_words: Range = (32, 32),
    new_tokens: Range = (64, 64),
    seed: int = 0,
    save: Annotated[Path | None, typer.Option(help="File to keep the workload in.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Such a file, in a workload's place.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results, report and plots.")] = None,
) -> None:
    """Play WORKLOAD: with --streams as a closed loop, else as an open one at --rate.

    Exits with 1 if a request failed; one that is refused with 429 is counted apart. A workload
    over reloads is the command reloads.
    """
    with _one_message():
        settings = Settings(
            base=base,
            num_requests=requests,
            num_adapters=num_adapters,
            rate=rate,
            cv=cv,
            exponent=exponent,
            prompt_words=prompt_words,
            new_tokens=new_tokens,
            flood=flood,
            seed=seed,
        )
        keys = None if tenant_keys is None else read_keys(tenant_keys)
        drawn = prepare(workload, settings, replay, save)
        found = run(Target(url, base, api, api_key, keys), drawn, streams, out)
        typer.echo(text(drawn, streams, found))
    if found.num_failed:
        raise typer.Exit(1)


@app.command("compare")
def compare_command(
    peers: Annotated[Path, typer.Option(help="Where they are, or are set up.")] = BUILD / "peers",
    out: Annotated[Path, typer.Option(help="Folder for table and logs.")] = BUILD / "compare",
    rounds: Count = 3,
    requests: Annotated[int, typer.Option(min=32, help="Per round of 32 streams.")] = 64,
    new_tokens: Tokens = 64,
) -> None:
    """Set up vLLM, llama.cpp and PEFT, and hold this server against them in turn."""
    from loadtest.compare import Plan as ComparePlan
    from loadtest.compare import compare

    with _one_message():
        comparison = compare(ComparePlan(peers, rounds, requests, new_tokens), out)
    typer.echo(comparison.markdown())


@app.command("sweep")
def sweep_command(
    axes: Annotated[
        list[str] | None, typer.Argument(help="What grows; all without it.", metavar="[AXES]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and plots.")] = BUILD / "sweep",
    rounds: Count = 3,
    most: Annotated[int, typer.Option(min=1, help="Leave out larger values.")] = 2000,
    requests: Annotated[int, typer.Option(min=1, help="Of each stream in a round.")] = 2,
) -> None:
    """Start servers, and measure them as adapters, rank, streams or prompts grow.

    AXES are registered, batch, rank, streams and prompt.
    """
    from loadtest.sweep import AXES, sweep

    with _one_message():
        if unknown := set(axes or ()) - set(AXES):
            raise RuntimeError(f"no axis is called {', '.join(unknown)}: one of {', '.join(AXES)}")
        for name in axes or AXES:
            typer.echo(sweep(name, out, rounds=rounds, most=most, requests=requests))


@app.command("registered")
def registered_command(
    out: Annotated[Path, typer.Option(help="Folder for adapters and logs.")] = BUILD / "registered",
    count: Annotated[int, typer.Option(min=5)] = 2000,
    rank: Annotated[str, typer.Option(help="Such as 8, or 8,64 in turn.")] = "8",
    load: Annotated[float, typer.Option(min=0.01, help="Of the base's capacity.")] = 0.8,
    rounds: Count = 3,
    requests: Count = 200,
) -> None:
    """Start servers with 5 and with 2,000 adapters, and play S-LoRA's workload to them in turn."""
    from loadtest.adapters import Kind
    from loadtest.registered import Plan as RegisteredPlan
    from loadtest.registered import measure_registered

    def measure() -> Report:
        kind = Kind.parse("A", rank, common_a=False, expanded=False)
        return measure_registered(RegisteredPlan(count, kind, load, rounds, requests), out)

    _tell(measure)


@app.command("flood")
def flood_command(
    out: Annotated[Path, typer.Option(help="Folder for adapters and logs.")] = BUILD / "flood",
    tenants: Annotated[int, typer.Option(min=2)] = 8,
    load: Annotated[float, typer.Option(min=0.01, help="Without the flood, of capacity.")] = 0.5,
    flood: Annotated[float, typer.Option(min=1, help="Times its share.")] = 10.0,
    rounds: Count = 3,
    requests: Annotated[int, typer.Option(min=1, help="Of a round without the flood.")] = 100,
) -> None:
    """Start a server with API keys, and let one tenant send many times its share in turn."""
    from loadtest.flood import Plan as FloodPlan
    from loadtest.flood import measure_flood

    _tell(lambda: measure_flood(FloodPlan(tenants, load, flood, rounds, requests), out))


@app.command()
def adapters(
    folder: Path,
    count: Count = 32,
    rank: Annotated[str, typer.Option(help="Such as 16, or 8,64 in turn.")] = "16",
    share: Annotated[str, typer.Option(help="What all layers share: none, A, B or AB.")] = "A",
    common_a: Annotated[bool, typer.Option(help="All adapters have the same A.")] = False,
    expanded: Annotated[bool, typer.Option(help="As plain PEFT LoRA.")] = False,
    gguf: Annotated[
        Path | None, typer.Option(help="Folder for the same in llama.cpp's form.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the base.")] = None,
) -> None:
    """Write synthetic adapters t000, t001, ... into FOLDER."""
    from loadtest.adapters import Kind, write_adapters

    with _one_message():
        kind = Kind.parse(share, rank, common_a=common_a, expanded=expanded)
        write_adapters(folder, count, kind, gguf=gguf, model=model)


@app.command()
def gaps(
    url: Url = DEFAULT_URL,
    base: Base = DEFAULT_BASE,
    streams: Count = 8,
    prompt_words: Count = 1500,
) -> None:
    """Streams decode; a long prompt arrives: how long does any of them wait for its next token?"""
    _show(lambda: quick.measure_gaps(url, base, streams, prompt_words))


@app.command()
def memory(
    pid: int, url: Url = DEFAULT_URL, num_adapters: Count = 50, requests: Count = 2000
) -> None:
    """Resident memory of process PID after a tenth of the requests and after all of them."""
    _show(lambda: quick.measure_memory(pid, url, num_adapters, requests))


@app.command()
def pool(url: Url = DEFAULT_URL) -> None:
    """What the server's metrics say of the adapters' memory."""
    _show(lambda: quick.read_pool(url))


@app.command()
def uploads(
    url: Url = DEFAULT_URL,
    adapter: AdapterFolder = EXAMPLE,
    rounds: Count = 20,
    prompt_words: Count = 16,
) -> None:
    """How long an upload takes, and how soon after it the adapter's first token comes."""
    _tell(lambda: measure_uploads(url, adapter, rounds, prompt_words))


@app.command()
def reloads(
    url: Url = DEFAULT_URL,
    adapter: AdapterFolder = EXAMPLE,
    rounds: Count = 4,
    publications: Count = 100,
    roll_backs: Annotated[int, typer.Option(min=0)] = 20,
    pause_seconds: Annotated[float, typer.Option(min=0)] = 0.2,
    quiet_seconds: Annotated[float, typer.Option(min=0.1)] = 15.0,
    streams: Count = 16,
    prompt_words: Count = 16,
    new_tokens: Tokens = 32,
) -> None:
    """What publications and rollbacks of an adapter cost the streams to it."""
    plan = Plan(
        rounds=rounds,
        publications=publications,
        roll_backs=roll_backs,
        pause_seconds=pause_seconds,
        quiet_seconds=quiet_seconds,
        streams=streams,
        prompt_words=prompt_words,
        new_tokens=new_tokens,
    )
    _tell(lambda: measure_reloads(url, adapter, plan))


@app.command()
def tiers(
    url: Url = DEFAULT_URL,
    resident_url: Annotated[
        str | None, typer.Option(help="Of a second server, with room for every adapter.")
    ] = None,
    num_adapters: Count = 2000,
    exponent: Annotated[float, typer.Option(min=0.01, help="Power law; 1 is uniform.")] = 0.3,
    requests: Count = 600,
    rounds: Count = 4,
    streams: Count = 16,
    prompt_words: Count = 8,
    new_tokens: Tokens = 32,
    seed: int = 0,
) -> None:
    """Power-law traffic to adapters t000, t001, ..., of which few fit the device's memory."""
    load = Load(
        num_adapters=num_adapters,
        exponent=exponent,
        requests=requests,
        rounds=rounds,
        streams=streams,
        prompt_words=prompt_words,
        new_tokens=new_tokens,
        seed=seed,
    )
    _tell(lambda: measure_tiers(url, resident_url, load))


@app.command()
def merging(
    url: Url = DEFAULT_URL,
    base: Base = DEFAULT_BASE,
    adapter: Annotated[str, typer.Option(help="Name of the one to merge.")] = EXAMPLE.name,
    rounds: Count = 3,
) -> None:
    """What merging by traffic gains one adapter, on a server with --merge auto."""
    _tell(lambda: measure_merging(url, base, adapter, rounds))


@app.command("step")
def step_command(
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of adapters, at least as many as streams.")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="May be given several times; else 1, 8 and 32.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    adapter_memory: Annotated[
        str, typer.Option(help="For adapters; all that are asked must fit.")
    ] = "2GiB",
    new_tokens: Annotated[int, typer.Option(min=4)] = 80,
    rounds: Count = 3,
    output: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
) -> None:
    """Where a decode step's time goes, without HTTP; starts an engine of its own."""
    from loadtest.step import measure_steps

    with _one_message():
        times = measure_steps(
            adapters,
            streams=streams or [1, 8, 32],
            threads=threads,
            adapter_memory=adapter_memory,
            num_tokens=new_tokens,
            rounds=rounds,
        )
        if output is not None:
            output.write_text(json.dumps(times.as_dict(), indent=2) + "\n")
    typer.echo(times.as_markdown())


@app.command()
def training(
    data: Annotated[Path, typer.Argument(help="As sharelora-serve train takes it.")],
    user: Annotated[str | None, typer.Option(help="As of sharelora-serve train.")] = None,
    assistant: Annotated[str | None, typer.Option(help="As of sharelora-serve train.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the base.")] = None,
    rank: Count = 16,
    batch_size: Count = 8,
    steps: Count = 20,
    rounds: Count = 3,
) -> None:
    """Tokens per second of training, against PEFT with transformers' Trainer in turn."""
    from loadtest.training import measure_training
    from sharelora_serve.adapters.layout import MODULES
    from sharelora_serve.training.counts import Method
    from sharelora_serve.training.data import make_template
    from sharelora_serve.training.settings import TrainSettings

    settings = TrainSettings(
        MODULES, Method(""), rank=rank, alpha=2.0 * rank, batch_size=batch_size
    )
    with _one_message():
        template = make_template(user, assistant)
        text = measure_training(
            data, template, model=model, settings=settings, num_steps=steps, rounds=rounds
        )
    typer.echo(text)


def _tell(measure: Callable[[], Report]) -> None:
    """Print what was measured; exit with 1 if it failed, or could not be measured at all."""
    with _one_message():
        report = measure()
    report.end()


@contextmanager
def _one_message() -> Iterator[None]:
    """Turn what cannot be measured into a message and the exit code 1."""
    try:
        yield
    except (RuntimeError, ServeError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


def _show(measure: Callable[[], quick.QuickFigures]) -> None:
    """Print what was measured as a line of JSON; exit with 1 if it could not be."""
    with _one_message():
        typer.echo(json.dumps(measure()))


def _end(*_signal: object) -> None:
    """Leave by the way on which servers that were started are ended."""
    raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, _end)
    app()
