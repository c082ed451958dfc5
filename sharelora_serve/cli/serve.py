"""The command serve: its options are ServeConfig's fields."""

import asyncio
import gc
import inspect
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import uvicorn
from rich.console import Console
from rich.markup import escape

from sharelora_serve.cli.failure import one_message
from sharelora_serve.config import (
    ServeConfig,
    default_text,
    environment_variable,
    flag,
    value_text,
)
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.server.connection import BoundedConnection
from sharelora_serve.server.keys import read_keys
from sharelora_serve.server.logs import configure_logging

if TYPE_CHECKING:
    from sharelora_serve.engine.engine import Engine  # slow to import
    from sharelora_serve.server.drain import Drain

logger = logging.getLogger(__name__)

LAST_SECONDS = 1.0
"""How long clients whose requests failed at the end of the drain may take to read that."""

ECHO_SECONDS = 0.2
"""Signals closer together are one: make and timeout pass on what the whole group has had."""


def serve(**settings: str | bool | None) -> None:
    """Serve a base model and its adapters with OpenAI's HTTP API.

    A setting comes from its option, else from its environment variable, else from its default.
    """
    console = Console(stderr=True)
    # An orchestrator's SIGTERM stops the server as Ctrl-C does, while loading too.
    signal.signal(signal.SIGTERM, _interrupt)
    # A signal interrupts the loading; after a drain uvicorn raises it anew, which does nothing
    # where it was ignored from the start, as SIGINT is behind a shell's `&`.
    with suppress(KeyboardInterrupt), one_message():
        given = {name: value for name, value in settings.items() if value is not None}
        config = ServeConfig(**given)
        console.quiet = config.log_format == "json"  # nothing but one object a line
        _run(config, console)
    console.print("Stopped.")


def _run(config: ServeConfig, console: Console) -> None:
    configure_logging(config.log_level, config.log_format)
    # Before loading: a bad file of keys and a taken port are told at once.
    if config.api_keys is not None:
        read_keys(config.api_keys)
    listener = _bind(config.host, config.port)
    # Slow imports, which --help and the other commands need not wait for.
    with console.status(f"Loading {escape(config.base_name)}"):
        from sharelora_serve.engine.load import load_engine
        from sharelora_serve.server.app import create_app
    configure_logging(config.log_level, config.log_format)
    loaded = load_engine(config, console)
    application = create_app(loaded, config)
    server = _Server(
        uvicorn.Config(
            application,
            log_config=None,
            log_level=config.log_level,
            access_log=config.log_level == "debug",
            http=BoundedConnection,
            ws="none",  # websockets, if installed, would log every header, and so API keys
        ),
        loaded.engine,
        application.state.drain,
        application.state.stop_changes,
        lambda: _announce(config, listener, console),
    )
    if config.api_keys is None:
        _say_that_there_are_no_keys(config, listener)
    server.run(sockets=[listener])


def _announce(config: ServeConfig, listener: socket.socket, console: Console) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if console.quiet:
        adapters = str(config.adapters) if config.adapters else None
        fields = {"model": config.base_name, "adapters": adapters, "url": url}
        logger.info("serving", extra=fields)
        return
    adapters = f" and the adapters in {escape(str(config.adapters))}" if config.adapters else ""
    console.print(
        f"Serving [bold]{escape(config.base_name)}[/bold]{adapters} at [bold]{url}[/bold]",
        highlight=False,
        soft_wrap=True,
    )


def _say_that_there_are_no_keys(config: ServeConfig, listener: socket.socket) -> None:
    if ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        logger.info("no API keys: everyone on this machine may use and change everything")
        return
    logger.warning(
        "no API keys, and --host %s is not this machine alone: everyone who reaches port %d may "
        "use and change everything; make keys with 'sharelora-serve keys create' and give their "
        "file with --api-keys",
        config.host,
        listener.getsockname()[1],
    )


class _Server(uvicorn.Server):
    """Calls announce once requests are accepted; at a signal drains before it closes the port."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: "Engine",
        drain: "Drain",
        stop_changes: Callable[[], None],
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain = drain
        self._stop_changes = stop_changes
        self._announce = announce
        self._signalled_at: float | None = None  # time.monotonic()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # All threads wait for a full collection: 0.2 s if it went through what stays for good.
            gc.collect()
            gc.freeze()
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            super().handle_exit(sig, frame)
        elif now - self._signalled_at > ECHO_SECONDS:
            # Not the signal's default action, which the first process of a container does not have.
            os._exit(128 + sig)

    async def on_tick(self, counter: int) -> bool:
        is_signalled = await super().on_tick(counter)
        if is_signalled and not self._drain.has_begun:
            self._drain.begin()
        return self._drain.is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Whatever has not ended by now fails with the engine, so that its client is told. A change
        # of adapters that has begun is waited for.
        self._stop_changes()
        await asyncio.to_thread(self._engine.stop)
        cut = asyncio.get_running_loop().call_later(LAST_SECONDS, self._cut_connections)
        await super().shutdown(sockets)
        cut.cancel()
        gc.unfreeze()  # else what ends with the process is told as leaked

    def _cut_connections(self) -> None:
        """Leave clients that neither read nor send: uvicorn would wait for them for ever."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address but not listening: until all is loaded, clients are refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it every answer on a
    # connection that is kept alive waits 40 ms for the client's acknowledgement of its headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or "
            "--port"
        ) from error
    return listener


def _interrupt(_signal_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _option(setting: str) -> inspect.Parameter:
    """The typer option of one of ServeConfig's fields.

    Values stay text here: ServeConfig parses and checks them.
    """
    field = ServeConfig.model_fields[setting]
    is_switch = field.annotation is bool
    declaration = f"{flag(setting)}/--no-{flag(setting)[2:]}" if is_switch else flag(setting)
    option = typer.Option(
        declaration,
        help=field.description,
        envvar=environment_variable(setting),
        metavar=None if is_switch else value_text(setting),
    )
    return inspect.Parameter(
        setting,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default if is_switch else default_text(setting) or None,
        annotation=Annotated[bool if is_switch else str | None, option],
    )


# typer reads a command's options from its signature.
cast(Any, serve).__signature__ = inspect.Signature(
    [_option(setting) for setting in ServeConfig.model_fields]
)
