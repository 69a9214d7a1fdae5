"""What a chat template may spend, and what its operations cost.

A template is code that came with a downloaded model: nested loops, `"x" * 10**9` or a list that holds itself twice,
thirty times over, must end soon and in little memory. Every block that runs, every value that is made and every value
that is read to its end is paid for; what makes more than it reads is paid for before it is done. The budget grows with
the messages, so an honest template never meets its end. It counts work, not time: whether a template is refused does
not depend on how busy the machine is.

One unit is about 10 ns, a character read. The whole budget lasts about half a second and some 100 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.utils import Namespace

BUDGET = 50_000_000
BUDGET_PER_CHARACTER = 200
"""What each character of the messages adds: a template may read or copy it tens of times."""
LARGEST_SHARE = 16
"""No single value may take more than one part of so many of the budget."""

BLOCK, CALL, ITEM, MADE_CHARACTER, MADE_ITEM = 100, 500, 20, 4, 50
"""Units for a block that runs, a call or filter, an item read, and a character or item that is made and kept."""

_COLLECTIONS: Any = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_FORBIDDEN_METHODS = ("encode", "maketrans", "translate")


class Budget:
    """What one template may still spend.

    Args:
        num_characters: Size of the messages.
    """

    def __init__(self, num_characters: int) -> None:
        self.left = BUDGET + BUDGET_PER_CHARACTER * num_characters
        self._largest = self.left // LARGEST_SHARE

    def spend(self, units: int) -> bool:
        """Pay for work, and return True.

        Raises:
            TemplateError: There is not enough left.
        """
        self.left -= units
        if self.left < 0:
            raise TemplateError("it loops for too long, or makes texts that are too long")
        return True

    def read(self, value: Any, times: int = 1) -> Any:
        """Pay for reading a value and all that it holds, however often it holds it; return it."""
        self.spend(times * (len(value) if type(value) is str else size_of(value, self.left)))
        return value

    def made(self, value: Any) -> Any:
        """Pay for the memory of a new value, not for what it refers to; return it, an iterator as one that pays."""
        if isinstance(value, Iterator):
            return self._paying(value)
        units = 0
        if isinstance(value, str):
            units = MADE_CHARACTER * len(value)
        elif isinstance(value, int):
            units = value.bit_length()
        elif isinstance(value, (list, tuple, dict, set)):
            units = MADE_ITEM * len(value)
        self.spend(units if units <= self._largest else self.left + 1)
        return value

    def _paying(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(MADE_ITEM)
            yield item


def size_of(value: Any, most: int) -> int:
    """Return the units that reading a value to its end costs, or a number above `most` once that is certain.

    What is held twice is read twice: nested containers may print as far more than they occupy.
    """
    size = 0
    waiting: list[Any] = [value]
    while waiting and size <= most:
        value = waiting.pop()
        size += ITEM
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, int):
            size += value.bit_length() // 8
        elif isinstance(value, Namespace):
            size += 4 * ITEM  # it is slow to look into
            waiting.append(value._Namespace__attrs)
        elif isinstance(value, _COLLECTIONS):
            size += ITEM * len(value)
            waiting += value
        elif isinstance(value, Mapping):
            size += ITEM * len(value)
            waiting += value.keys()
            waiting += value.values()
    return size


def pay_for_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Pay for `left operator right`, before it is computed."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        if operator == "**":
            bits = (left.bit_length() * abs(right),) * 2  # those of the result, by which it is multiplied last
        budget.spend(bits[0] * bits[1] // 64)
    elif operator == "*":
        values, times = (right, left) if isinstance(left, int) else (left, right)
        if hasattr(values, "__len__") and isinstance(times, int):
            budget.spend(MADE_ITEM * len(values) * abs(times))
    elif operator == "%" and isinstance(left, str):
        pay_for_format(budget, left, "%", right)


def pay_for_format(budget: Budget, layout: str, mark: str, values: Any) -> None:
    """Pay for printing all values at each mark, as wide as any number says that is in the layout or among the values.

    Args:
        budget: Pays.
        layout: What to fill in.
        mark: Character that begins a place to fill in.
        values: What is filled in.
    """
    num_places = layout.count(mark)
    widths = sum(int(number) for number in re.findall(r"\d+", layout))
    if "*" in layout or re.search(r"{[^}]*{", layout):
        widths += num_places * magnitude(values)
    budget.spend(MADE_CHARACTER * (widths + num_places * size_of(values, budget.left)))


def pay_for_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Pay for `owner.name(...)`, before it is called.

    Raises:
        TemplateError: There is not enough left, or the method is not to be had.
    """
    budget.read((args, dict(kwargs)), MADE_CHARACTER)
    if isinstance(owner, (list, tuple)):
        budget.read(owner)
    elif isinstance(owner, (int, float)):
        budget.spend(magnitude(args))
    elif isinstance(owner, str):
        budget.read(owner, MADE_CHARACTER)
        if name in _FORBIDDEN_METHODS:
            raise SecurityError(f"it calls `{name}` of a text, which is not available")
        if name in ("format", "format_map"):
            pay_for_format(budget, owner, "{", (args, dict(kwargs)))
        elif name == "join":
            budget.spend(MADE_CHARACTER * len(owner) * sum(len(a) for a in args if hasattr(a, "__len__")))
        elif name == "replace":
            pay_for_replace(budget, owner, *args[:2])
        else:
            repeated = owner.count("\t") if name == "expandtabs" else 1
            budget.spend(MADE_CHARACTER * repeated * magnitude((args, dict(kwargs))))


def pay_for_replace(budget: Budget, text: str, old: Any = "", new: Any = "") -> None:
    """Pay for replacing every occurrence."""
    budget.spend(MADE_CHARACTER * text.count(str(old)) * len(str(new)))


def magnitude(values: Any) -> int:
    """Return the sum of all whole numbers among values, without their signs: what a width or a count may ask for."""
    if isinstance(values, int):
        return abs(values)
    if isinstance(values, Mapping):
        return sum(magnitude(value) for value in values.values())
    return sum(magnitude(value) for value in values) if isinstance(values, (list, tuple)) else 0
