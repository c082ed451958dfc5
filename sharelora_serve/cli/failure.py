"""How a command ends when the user, a file or a server is at fault: one message, exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer

from sharelora_serve.errors import ServeError

EXIT_CODE = 2


@contextmanager
def one_message() -> Iterator[None]:
    """Turn errors that are not bugs of ours into one message on standard error and an exit.

    Raises SystemExit with EXIT_CODE instead of ServeError, OSError and httpx's errors.
    """
    try:
        yield
    except (ServeError, OSError) as error:
        message = str(error)
    except httpx.HTTPError as error:
        # Raised while talking to a server, so the request is there.
        message = f"no answer from {error.request.url}: {error}; is a server running there?"
    else:
        return
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise SystemExit(EXIT_CODE)
