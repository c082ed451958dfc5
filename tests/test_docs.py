"""The docs say what the code does: settings, routes, metrics, errors, commands and links."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer.main
from fastapi.routing import APIRoute
from starlette.routing import Route

import sharelora_serve
from sharelora_serve import errors
from sharelora_serve.adapters.pool import PoolStats
from sharelora_serve.adapters.residency import CacheStats
from sharelora_serve.cli import app as command_line
from sharelora_serve.config import (
    ServeConfig,
    default_text,
    environment_variable,
    flag,
    value_text,
)
from sharelora_serve.engine.engine import EngineStats
from sharelora_serve.server.app import create_app
from sharelora_serve.server.body import OWN_CODES
from sharelora_serve.server.metrics import Metrics

ROOT = Path(__file__).parent.parent
OPERATIONS = ROOT / "docs" / "operations.md"
PACKAGE = Path(sharelora_serve.__file__).parent


def markdown_files() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("adapters/*/*.md")])


@cache
def operations() -> str:
    return OPERATIONS.read_text(encoding="utf-8")


def settings_row(setting: str) -> str:
    """A setting's line of the table in docs/operations.md."""
    value = value_text(setting).replace("|", "\\|")  # a bare one ends the cell
    option = f"`{flag(setting)} {value}`"
    if ServeConfig.model_fields[setting].annotation is bool:
        option = f"`{flag(setting)}` / `--no-{flag(setting)[2:]}`"
    default = f"`{default_text(setting)}`" if default_text(setting) else "none"
    description = ServeConfig.model_fields[setting].description
    return f"| {option} | `{environment_variable(setting)}` | {default} | {description} |"


@pytest.mark.parametrize("setting", ServeConfig.model_fields)
def test_every_setting_stands_in_the_table_as_the_code_has_it(setting: str) -> None:
    assert settings_row(setting) in operations().splitlines()


def test_the_docs_name_no_setting_that_there_is_not() -> None:
    known = {environment_variable(setting) for setting in ServeConfig.model_fields}
    known |= {"SHARELORA_URL", "SHARELORA_API_KEY"}  # of the commands that talk to a server
    for path in [*markdown_files(), ROOT / "Dockerfile"]:
        found = set(re.findall(r"SHARELORA_[A-Z_]+", path.read_text(encoding="utf-8")))
        assert found <= known, path


def routes() -> Iterator[tuple[str, str]]:
    """Method and path of every route: those of the API, and FastAPI's pages about them."""
    unused: Any = (None, None)  # the engine is touched when the server starts, not before
    application = create_app(unused, ServeConfig())
    for path, operations_of_path in application.openapi()["paths"].items():
        for method in operations_of_path:
            yield method.upper(), path
    for route in application.routes:
        if isinstance(route, Route) and not isinstance(route, APIRoute):
            yield "GET", route.path


def test_every_route_is_in_the_docs_and_no_other() -> None:
    table = operations().partition("## Routes")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`([A-Z]+) (/\S*)`", table))
    assert documented == {(method, path.replace(":path}", "}")) for method, path in routes()}


def metric_names() -> set[str]:
    """Every family that /metrics has, named as its samples are."""
    pool = PoolStats(**dict.fromkeys((field.name for field in fields(PoolStats)), 0))
    cache_stats = CacheStats(
        **{field.name: 0 for field in fields(CacheStats) if field.name != "pool"}, pool=pool
    )
    engine: Any = SimpleNamespace(  # only its figures are asked for
        base_name="base",
        stats=lambda: EngineStats(*(0 for _ in fields(EngineStats))),
        adapters=SimpleNamespace(stats=lambda: cache_stats),
    )
    registry: Any = SimpleNamespace(adapters=list)
    families = Metrics(engine, registry, num_named_adapters=1).registry.collect()
    return {
        f"{family.name}_total" if family.type == "counter" else family.name for family in families
    }


def test_every_metric_is_in_the_docs_and_no_other() -> None:
    table = operations().partition("## Metrics")[2].partition("\n## ")[0]
    rows = set(re.findall(r"^\| `(\w+)(?:\{\w+\})?` \|", table, re.MULTILINE))
    assert rows == metric_names()
    assert set(re.findall(r"`(sharelora_[a-z_]+)", operations())) <= metric_names()


def subclasses(of: type[errors.ServeError]) -> Iterator[type[errors.ServeError]]:
    yield of
    for subclass in of.__subclasses__():
        yield from subclasses(subclass)


def test_every_error_code_is_in_the_docs_with_its_status() -> None:
    table = operations().partition("## Errors")[2].partition("\n## ")[0]
    rows = {
        (int(status), code)
        for status, codes in re.findall(r"^\| (\d{3}) \| (.+?) \|", table, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    at_start = (errors.UnsupportedModelError, errors.ConfigurationError)
    raised = {
        (error.status, error.code)
        for error in subclasses(errors.ServeError)
        if not issubclass(error, at_start)
    }
    raised |= {(400, code) for code in OWN_CODES | problem_codes()}
    raised |= {(404, "not_found"), (405, "method_not_allowed")}
    assert rows == raised


def problem_codes() -> set[str]:
    """The second argument of every Problem(...) that the server makes."""
    codes = set()
    for path in sorted(PACKAGE.glob("server/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem":
                codes |= {
                    part.value
                    for part in ast.walk(node.args[1])
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                }
    return codes


def commands() -> dict[str, click.Command]:
    """Every command that does something, by its whole name."""

    def below(name: str, command: Any) -> Iterator[tuple[str, click.Command]]:
        for part, child in getattr(command, "commands", {}).items():
            yield from below(f"{name} {part}", child)
        if not hasattr(command, "commands"):
            yield name, command

    return dict(below("sharelora-serve", typer.main.get_command(command_line)))


@pytest.mark.parametrize("name", commands())
def test_every_command_is_documented_and_explains_itself(name: str) -> None:
    command = commands()[name]
    assert command.help, f"{name} has no help"
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", OPERATIONS)]
    assert any(re.search(rf"{name}\b", text) for text in texts)


def test_the_docs_name_no_command_that_there_is_not() -> None:
    groups = ("adapters", "keys")
    known = {"sharelora-serve", *(f"sharelora-serve {group}" for group in groups), *commands()}
    for path in markdown_files():
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"(?:^\$? ?|`|/)(sharelora-serve(?: [a-z]+)*)", text, re.MULTILINE):
            words = found.split()
            named = words[: 3 if words[1:2] and words[1] in groups else 2]
            assert " ".join(named) in known, f"{path}: {found}"


def test_every_make_target_in_the_docs_is_one() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    for path in markdown_files():
        text = path.read_text(encoding="utf-8")
        found = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        assert found <= targets, path


def anchors(path: Path) -> set[str]:
    """What a link's #fragment may be: headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, fragment = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert not fragment or fragment in anchors(target), f"{link} names no heading"


def test_the_package_for_torch_is_pinned_alike_everywhere() -> None:
    pins = {
        name: set(re.findall(r"torch==([\d.]+)", (ROOT / name).read_text(encoding="utf-8")))
        for name in ("Makefile", "Dockerfile")
    }
    assert pins["Makefile"] == pins["Dockerfile"] != set()


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{sharelora_serve.__version__}]" in text
