"""docs/measurements says what is kept there, and each claim names a command that exists and a place that does."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from edge_runtime.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "measurements"
CLAIMS = json.loads((DOCS / "claims.json").read_text(encoding="utf-8"))

spec = importlib.util.spec_from_file_location("measurements", ROOT / "tools" / "measurements.py")
assert spec and spec.loader
measurements = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measurements)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pages_are_written_from_what_is_kept() -> None:
    for path, text in measurements.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python tools/measurements.py write"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["claim"][:40])
def test_a_claim_names_a_command_and_a_place_that_exist(claim: dict[str, str]) -> None:
    page, _, anchor = claim["page"].partition("#")
    assert anchor in anchors(DOCS / page)
    command = claim.get("command") or measurements.read_result(claim["result"])["command"]
    program, first, second = [*command.split(), ""][:3]
    if program == "python":
        assert (ROOT / first).is_file()
    else:
        assert f"{first} {second}" in COMMANDS or first in COMMANDS


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")) + sorted(ROOT.glob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"
