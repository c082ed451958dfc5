"""Tables in Markdown, and figures as people read them."""

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table; a bar within a cell is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def figure(value: float | None) -> str:
    """To three significant digits, such as 12.3, 0.00123 or 12300; a dash for None."""
    if value is None:
        return "-"
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text and abs(value) >= 1 else text
