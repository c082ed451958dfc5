"""Finding stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Lets text through until a stop string is complete, whatever pieces the text comes in.

    The text ends at the first place where any stop string is complete; of several that are
    complete at that place the longest counts. Text that may be the beginning of a stop string is
    held back until it is known not to be.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop: bool) -> None:
        """With `include_stop` the text that ends the generation is let through as well.

        Every stop string has at least one character.
        """
        assert all(stop_strings), "an empty stop string would match everywhere"
        self._stop_strings = tuple(stop_strings)
        self._include_stop = include_stop
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Add `text` and return what may be shown now; sets `is_stopped` when a stop is found.

        Must not be called again after that.
        """
        assert not self.is_stopped, "nothing may follow a stop string"
        text = self._held + text
        end, start = len(text) + 1, 0
        for stop in self._stop_strings:
            found = text.find(stop)
            if found >= 0:
                end, start = min((end, start), (found + len(stop), found))
        if end <= len(text):
            self.is_stopped, self._held = True, ""
            return text[: end if self._include_stop else start]
        held = (self._length_held(stop, text) for stop in self._stop_strings)
        shown = len(text) - max(held, default=0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string, at the end of the text."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _length_held(stop: str, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of `stop`."""
        position = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while position >= 0:
            if stop.startswith(text[position:]):
                return len(text) - position
            position = text.find(stop[0], position + 1)
        return 0
