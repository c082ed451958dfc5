"""The command chat, against a server on a real socket."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sharelora_serve.cli import app
from tests.cli.http_server import error, events, scripted_server

BASE = {"model": "acme", "temperature": 0.0, "stream": True}


def test_one_message_is_answered_as_it_streams() -> None:
    with scripted_server((200, events("Hel", None, "lo [bold]\t:tv:\n", "world", ""))) as server:
        result = CliRunner().invoke(
            app, ["chat", "--model", "acme", "--url", f"{server.url}/v1/", "hi"]
        )
    assert result.exit_code == 0
    assert result.stdout == "Hello [bold]\t:tv:\nworld\n"
    messages = [{"role": "user", "content": "hi"}]
    assert server.requests == [("POST", "/v1/chat/completions", {**BASE, "messages": messages})]


def test_options_go_into_the_request_and_standard_input_is_the_message() -> None:
    command = ["chat", "--model", "acme", "--system", "Be brief.", "--max-tokens", "7"]
    with scripted_server((200, events("ok"))) as server:
        result = CliRunner().invoke(
            app,
            [*command, "--temperature", "0.5"],
            input="a\nb\n",
            env={"SHARELORA_URL": server.url},
        )
    assert result.stdout == "ok\n"
    assert server.requests[0][2] == {
        **BASE,
        "temperature": 0.5,
        "max_tokens": 7,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a\nb\n"},
        ],
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, error("no model 'acme'")), "Error: no model 'acme'"),
        ((502, "<html>bad gateway"), "answered 502: <html>bad gateway"),
        ((500, {"detail": "x"}), "answered 500"),
        ((200, events("half", done=False)), "closed the connection before the answer ended"),
        ((200, 'data: {"error": {"message": "the engine stopped"}}\n\n'), "the engine stopped"),
    ],
)
def test_what_goes_wrong_at_the_server_is_one_message(
    answer: tuple[int, object], message: str
) -> None:
    with scripted_server(answer) as server:
        result = CliRunner().invoke(app, ["chat", "--model", "acme", "--url", server.url, "hi"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_that_is_not_there_is_one_message() -> None:
    with scripted_server() as server:
        url = server.url
    result = CliRunner().invoke(app, ["chat", "--model", "acme", "--url", url, "hi"])
    assert result.exit_code == 2
    assert f"no answer from {url}/v1/chat/completions" in result.stderr
    assert "is a server running there?" in result.stderr


def test_a_conversation_sends_what_was_said_before() -> None:
    command = [sys.executable, "-m", "sharelora_serve.cli", "chat", "--model", "acme"]
    terminal, child = pty.openpty()
    with scripted_server((200, events("one")), (200, events("two"))) as server:
        process = subprocess.Popen(
            [*command, "--url", server.url],
            stdin=child,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
        )
        os.close(child)
        os.write(terminal, b"first\n\nsecond\n\x04")
        output, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 0
    assert b"one" in output
    assert b"two" in output
    assert [len(request[2]["messages"]) for request in server.requests] == [1, 3]
    assert server.requests[1][2]["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
    ]
