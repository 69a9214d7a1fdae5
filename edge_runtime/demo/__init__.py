"""The embedded default pair: a small target for stories and Python, and the draft that was trained for it.

It is what runs when no model is named: small enough to come with the package, and real: README.md beside this file is
its model card, with recipe, data and measured acceptance.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def or_demo(target: str | Path | None, draft: str | Path | None) -> tuple[str | Path, str | Path | None]:
    """Return target and draft as they are named; where no target is, the embedded one, with its draft if none is."""
    return (target, draft) if target is not None else (demo_target(), draft or demo_draft())


def is_demo(target: str | Path) -> bool:
    """Whether a target is the embedded one."""
    return Path(target) == demo_target()


def demo_target() -> Path:
    """Return the model folder of the embedded target."""
    return FOLDER / "target"


def demo_draft() -> Path:
    """Return the model folder of its draft."""
    return FOLDER / "draft"
