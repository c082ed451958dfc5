"""What a measurement tells: a table of figures, each beside its aim, and an exit code."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

_MAX_LISTED = 5  # failures spelled out; the rest are counted


class Report:
    """A table that grows while it is measured.

    A figure that misses its aim is only said to; a wrong answer or a failed request fails the
    command.
    """

    def __init__(self, title: str) -> None:
        self.is_failed = False
        self._table = Table(title=title, title_justify="left")
        for heading in ("", "measured", "aim", "verdict"):
            self._table.add_column(heading)
        self._failures: Sequence[str] = ()

    def add(self, what: str, measured: str, aim: str = "", *, is_met: bool | None = None) -> None:
        """One figure with its unit; is_met is None where there is no aim."""
        verdict = {None: "", True: "met", False: "missed"}[is_met]
        self._table.add_row(escape(what), escape(measured), escape(aim), verdict)

    def check(self, num_answers: int, num_wrong: int, failures: Sequence[str]) -> None:
        """Of so many answers so many were wrong, and these requests had none."""
        num_requests = num_answers + len(failures)
        self._must_be_none("wrong answers", num_wrong, num_requests)
        self.check_answered(num_requests, failures)

    def check_answered(self, num_requests: int, failures: Sequence[str]) -> None:
        """Of so many requests these had no answer; what others said is not compared."""
        self._failures = failures
        self._must_be_none("failed requests", len(failures), num_requests)

    def _must_be_none(self, what: str, count: int, total: int) -> None:
        self.add(what, f"{count} of {total}", "0", is_met=count == 0)
        self.is_failed |= count > 0

    def end(self) -> None:
        """Print everything; raises typer.Exit with code 1 if it failed."""
        console = Console()
        console.print(self._table)
        for failure in self._failures[:_MAX_LISTED]:
            console.print(f"failed: {failure}", markup=False, highlight=False)
        if len(self._failures) > _MAX_LISTED:
            console.print(f"and {len(self._failures) - _MAX_LISTED} more")
        if self.is_failed:
            raise typer.Exit(1)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error if that is a terminal; what is yielded moves it by one."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(description, total=total)
        yield lambda: bars.advance(task)


def milliseconds(seconds: float) -> str:
    """Such as '12.3 ms'."""
    return f"{1000 * seconds:.1f} ms"
