"""Stop strings over text that arrives piece by piece: nothing that may begin one is let through too early."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first occurrence of any stop string, wherever the pieces are cut.

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
        found = [at for at in (self._held.find(stop) for stop in self._strings) if at >= 0]
        if found:
            self.is_found = True
            return self._release(min(found))
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
