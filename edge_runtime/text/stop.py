"""Stop strings over text that arrives piece by piece: nothing that may begin one is let through too early."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the stop string that completes first, wherever the pieces are cut.

    Args:
        strings: Non-empty stop strings; none lets everything through at once.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """Take more text; return what can be shown now."""
        if not self._strings:
            return text
        if self.is_found:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._strings if (at := self._held.find(stop)) >= 0]
        if found:  # the first to complete: the only choice that does not depend on where the pieces were cut
            self.is_found = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._longest_beginning())

    def flush(self) -> str:
        """Return what was held back, once no more text comes."""
        return "" if self.is_found else self._release(len(self._held))

    def _release(self, size: int) -> str:
        shown, self._held = self._held[:size], "" if self.is_found else self._held[size:]
        return shown

    def _longest_beginning(self) -> int:
        """Return the length of the longest ending of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._strings) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._strings):
                return size
        return 0
