"""The command params: what each form of an adapter costs, from a model's configuration alone."""

import json
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import show
from sharelora_serve.config import format_bytes

_BYTES = 2  # of a value: float16 or bfloat16, as adapters are stored


def params(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face folder or hub id, of which only config.json is read, such as "
            "./llama or openai-community/gpt2; without it the embedded base. Any encoder or "
            "decoder that transformers knows, those that this server cannot serve too.",
        ),
    ] = None,
    modules: Annotated[
        str,
        typer.Option(
            help="Linear layers that are adapted, such as q_proj,v_proj, or query,value of "
            "RoBERTa; c_attn.q,c_attn.v are GPT-2's fused ones apart."
        ),
    ] = "all-linear",
    rank: Annotated[int, typer.Option(min=1, help="Rows of A, columns of B.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count what LoRA and each form of ShareLoRA train and store."""
    from sharelora_serve.models.source import base_folder
    from sharelora_serve.training.counts import compared_methods, num_trained
    from sharelora_serve.training.shapes import read_linear_shapes

    with one_message():
        linear = read_linear_shapes(base_folder(model, config_only=True))
        shapes = linear.choose(modules)
        counts = {
            name: num_trained(linear.num_layers, shapes, rank, method)
            for name, method in compared_methods(shapes).items()
        }
        if as_json:
            methods = {
                name: {"parameters": count, "bytes": _BYTES * count}
                for name, count in counts.items()
            }
            about = {"layers": linear.num_layers, "rank": rank, "modules": sorted(shapes)}
            show(json.dumps({**about, "methods": methods}, indent=2))
            return
        show(f"{linear.num_layers} layers, rank {rank}, {len(shapes)} modules: {', '.join(shapes)}")
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("Adapter")
        for heading in ("Parameters", "In 16 bits", "Of LoRA"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, count in counts.items():
            share = f"{count / counts['LoRA']:.1%}"
            table.add_row(name, f"{count:,}", format_bytes(_BYTES * count), share)
        show(table)
