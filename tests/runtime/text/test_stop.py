"""Stop strings: the same text whatever the pieces, and nothing shown that belongs to a stop string."""

from __future__ import annotations

import random

import pytest

from edge_runtime.text.stop import StopStrings


def shown(pieces: list[str], *stops: str) -> tuple[str, bool]:
    """Return all that is shown of a text that arrives in pieces, and whether a stop string ended it."""
    stop = StopStrings(stops)
    text = "".join(stop.push(piece) for piece in pieces)
    return text + stop.flush(), stop.is_found


def cut(text: str, chooser: random.Random) -> list[str]:
    """Cut a text at random places; empty pieces happen, as they do with partial characters."""
    places = sorted(chooser.randrange(len(text) + 1) for _ in range(chooser.randrange(len(text) + 2)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two three", ("two",), ("one ", True)),
        ("one two three", ("three",), ("one two ", True)),
        ("one two thre", ("three",), ("one two thre", False)),
        ("aaab", ("aab",), ("a", True)),
        ("ababac", ("abac",), ("ab", True)),
        ("xyz", ("z", "yz"), ("x", True)),
        ("abcd", ("abcd", "b"), ("a", True)),
        ("abcd", ("bcx", "cd"), ("ab", True)),
        ("say \n\nUser: hi", ("\nUser:", "\n\n"), ("say ", True)),
        ("naïve 🦊 fox", ("🦊",), ("naïve ", True)),
        ("stop", ("stop",), ("", True)),
        ("", ("stop",), ("", False)),
        ("nothing to stop", (), ("nothing to stop", False)),
    ],
)
def test_text_ends_before_the_first_stop_string_to_complete(text, stops, wanted):
    """Whole, letter by letter, and cut at random: the earliest to begin is not always the first to complete."""
    chooser = random.Random(text)
    for pieces in ([text], list(text), *(cut(text, chooser) for _ in range(50))):
        assert shown(pieces, *stops) == wanted


def test_random_texts_do_not_depend_on_where_they_are_cut():
    """A small alphabet makes overlapping beginnings common."""
    chooser = random.Random(7)
    for _ in range(1000):
        stops = ["".join(chooser.choices("ab", k=chooser.randint(1, 4))) for _ in range(chooser.randint(1, 3))]
        text = "".join(chooser.choices("abc", k=chooser.randint(1, 20)))
        letter_by_letter = shown(list(text), *stops)
        assert shown(cut(text, chooser), *stops) == letter_by_letter
        assert letter_by_letter[1] == any(stop in text for stop in stops)
        assert not any(stop in letter_by_letter[0] for stop in stops)
        assert text.startswith(letter_by_letter[0])


def test_nothing_is_held_back_longer_than_needed():
    """A reader sees text as soon as no stop string can begin in it."""
    stop = StopStrings(["END"])
    assert [stop.push(piece) for piece in ("a", "E", "N", "b", "EN", "EX")] == ["a", "", "", "ENb", "", "ENEX"]


def test_nothing_follows_a_stop_string():
    """openvino.genai keeps the tokens of the block that follow it."""
    stop = StopStrings(["b"])
    assert [stop.push("ab"), stop.push("more"), stop.flush()] == ["a", "", ""]
