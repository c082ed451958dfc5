"""Servers that are started, held still and ended; peers that cannot be set up."""

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from loadtest.endpoint import Endpoint, OpenAiEndpoint
from loadtest.peers import Peer
from loadtest.servers import Command, free_port, memory_settings, only, running


def file_server(folder: Path) -> Command:
    port = free_port()
    words = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    return Command((*words, "--directory", str(folder)), port, "/")


def test_a_server_answers_but_while_it_is_held_still(tmp_path: Path) -> None:
    with running(file_server(tmp_path), tmp_path / "log") as server:
        assert httpx.get(server.url).status_code == 200
        assert server.resident_mib > 1
        server.hold_still()
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(server.url, timeout=0.5)
        with only(server, [server]):
            assert httpx.get(server.url).status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(server.url, timeout=0.5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_what_a_server_would_leave_running_is_ended_too(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = file_server(tmp_path)
    # A child that is deaf to SIGTERM and holds the pipe open as long as it lives.
    script = f"(trap '' TERM; sleep 300 > {pipe}) & exec {shlex.join(command.words)}"
    with ExitStack() as stack:
        words = ("/bin/sh", "-c", script)
        with running(Command(words, command.port, "/"), tmp_path / "log"):
            end = stack.enter_context(pipe.open("rb"))
        assert end.read() == b""  # which comes when nobody can write any more


def test_a_server_that_does_not_start_says_what_its_log_says(tmp_path: Path) -> None:
    command = Command((sys.executable, "-c", "raise SystemExit('no weights')"), free_port(), "/")
    with (
        pytest.raises(RuntimeError, match="no weights"),
        running(command, tmp_path / "folder" / "log"),
    ):
        pass


def test_room_is_for_all_adapters_or_for_a_share_of_them(tmp_path: Path) -> None:
    size = 100_000_000
    for number in range(20):
        folder = tmp_path / f"t{number:03d}"
        folder.mkdir()
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.truncate(size)
    everything = memory_settings(tmp_path, in_batch=8)
    assert everything == (
        *("--adapter-memory", f"{10 * size}B"),
        *("--adapter-host-memory", f"{25 * size}B"),
    )
    half = memory_settings(tmp_path, in_batch=8, share=0.5)
    assert half == ("--adapter-memory", f"{5 * size}B", "--adapter-host-memory", f"{5 * size}B")
    little = memory_settings(tmp_path, in_batch=8, share=0.05)
    assert little[:2] == ("--adapter-memory", f"{2 * size}B")


class MissingPeer(Peer):
    name = "a peer"
    folder_name = "peer"
    is_set_up = False

    def command(self, model_folder: Path, adapters: Path, gguf: Path) -> Command:
        raise NotImplementedError

    def endpoint(self, url: str, base: str) -> Endpoint:  # noqa: ARG002
        return OpenAiEndpoint()

    def _set_up(self) -> None:
        self._pip("install", "--no-index", "sharelora-no-such-package")


def test_a_folder_that_was_there_before_is_not_taken_for_a_peer(tmp_path: Path) -> None:
    mine = tmp_path / "peer" / "mine"
    mine.parent.mkdir()
    mine.write_text("do not lose")
    with pytest.raises(RuntimeError, match="move it away, or name another folder with --peers"):
        MissingPeer(tmp_path).prepare()
    assert mine.read_text() == "do not lose"


@pytest.mark.slow
def test_a_peer_that_cannot_be_set_up_says_why(tmp_path: Path) -> None:
    peer = MissingPeer(tmp_path)
    for _ in range(2):  # what the first try leaves is no hindrance
        with pytest.raises(RuntimeError, match="No matching distribution found"):
            peer.prepare()
