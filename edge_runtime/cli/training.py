"""What the commands of `edge-run train` show while they work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.cli import console

if TYPE_CHECKING:
    from edge_export.fastdraft.data import OnProgress


class StageBars:
    """A bar for each stage on a terminal's stderr; elsewhere a line as a stage begins."""

    def __init__(self) -> None:
        from rich.progress import TextColumn, TimeRemainingColumn

        counts = TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
        self._bars = console.progress(counts, TimeRemainingColumn(), TextColumn("{task.fields[figure]}"))
        self._stage = ""

    def __enter__(self) -> OnProgress:
        self._bars.start()
        return self._show

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def _show(self, stage: str, done: int, wanted: int, figure: str) -> None:
        if stage != self._stage:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=wanted, figure="")
            if self._bars.disable:
                console.note(f"{stage}: {wanted:,} to do")
        self._bars.update(self._task, completed=done, total=wanted, figure=figure)
