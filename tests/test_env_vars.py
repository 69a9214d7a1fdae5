"""`docs/env_vars.md` names every environment variable that our code reads, and none of ours that it does not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READERS = ("edge_runtime", "export", "apps", "ov_kernels", "benchmarks", "tools")
PATTERNS = (
    r"""["'](EDGE_[A-Z_]+)["']""",
    r"""environ(?:\.get\(|\.setdefault\(|\[)["']([A-Z_]+)["']""",
    r"""getenv\(["']([A-Z_]+)["']""",
)


def variables_read() -> set[str]:
    """Return our own variables, and those that stand where the environment is asked."""
    paths = [path for name in READERS for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".cpp", ".hpp")]
    sources = [path.read_text(encoding="utf-8") for path in (*paths, ROOT / "tests" / "conftest.py")]
    return {name for source in sources for pattern in PATTERNS for name in re.findall(pattern, source)}


def test_the_page_names_what_is_read():
    page = (ROOT / "docs" / "env_vars.md").read_text(encoding="utf-8")
    listed, read = set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)), variables_read()
    assert {"EDGE_NPUW_DEVICES", "EDGE_KERNELS_LIBRARY", "EDGE_RUN_TEST_DATA", "NO_COLOR", "CI"} <= read
    assert read <= listed, f"not on the page: {sorted(read - listed)}"
    assert {name for name in listed if name.startswith("EDGE_")} <= read, "on the page, but nothing reads it"
