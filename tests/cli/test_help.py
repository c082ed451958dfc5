"""What --help shows on a terminal of 80 columns."""

import pytest
from typer.testing import CliRunner

from sharelora_serve.cli import app
from tests.test_docs import commands


def help_text(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    return result.stdout


@pytest.mark.parametrize("name", commands())
def test_every_option_and_its_whole_text_are_shown_at_80_columns(name: str) -> None:
    shown = help_text(*name.split()[1:])
    squeezed = "".join(shown.split())
    command = commands()[name]
    assert "".join((command.help or "").split()) in squeezed
    for parameter in command.params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            if option.startswith("--"):
                assert any(
                    line.lstrip().startswith("--") and option in line.replace("/", " ").split()
                    for line in shown.splitlines()
                ), option
        assert "".join((getattr(parameter, "help", None) or "").split()) in squeezed
        envvar = getattr(parameter, "envvar", None)
        assert envvar is None or envvar in shown


@pytest.mark.parametrize("group", [(), ("adapters",), ("keys",)])
def test_lists_of_commands_cut_no_line(group: tuple[str, ...]) -> None:
    assert "..." not in help_text(*group).replace("[ARGS]...", "")
