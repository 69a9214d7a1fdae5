"""docs/architecture.md says which files a token goes through; here one is followed."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edge_runtime
from edge_runtime.api import EdgeLLM

RUNTIME = Path(edge_runtime.__file__).parent
PAGE = RUNTIME.parent / "docs" / "architecture.md"
PATH = re.compile(r"<!-- path -->(.*)<!-- end of path -->", re.DOTALL)
CALLERS = {"cli/generate.py"}
"""Named as what may call the interface."""


def touched(work: Callable[[], Any]) -> set[str]:
    """Return the files of the runtime whose functions run, in any thread."""
    seen: set[str] = set()

    def note(frame: Any, event: str, arg: Any) -> None:
        seen.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {path.relative_to(RUNTIME).as_posix() for path in map(Path, seen) if path.is_relative_to(RUNTIME)}


def test_the_page_names_the_files_that_a_token_goes_through():
    found = PATH.search(PAGE.read_text(encoding="utf-8"))
    assert found, "the page has lost its path"
    named = set(re.findall(r"`([\w/]+\.py)`", found[1])) - CALLERS
    llm = EdgeLLM.load()
    llm.generate("Once upon a time", max_new_tokens=4)  # what is only done once is no part of the path
    plain = touched(lambda: llm.generate("Once upon a dream", max_new_tokens=40, num_draft_tokens=0))
    drafted = touched(lambda: llm.generate("Once upon a day", max_new_tokens=40, num_draft_tokens=3))
    assert plain == named
    assert drafted - plain == {"decoding/drafters/draft_model.py"}
    assert "`decoding/drafters/`" in found[1]
