"""The Hugging Face hub's cache on disk: a user who gives one of its folders gets the model that lies in it.

hub/models--ORG--NAME/refs/main             the commit that a branch stands for
hub/models--ORG--NAME/snapshots/COMMIT/     the model's files
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.errors import ModelFormatError

_PREFIX = "models--"


def resolve(folder: Path) -> Path:
    """Return the newest snapshot in a model's cache folder, or `folder` itself if it is no part of the cache's frame.

    Raises:
        ModelFormatError: The cache folder holds no snapshot, several without a `main`, or several models.
    """
    if (folder / "snapshots").is_dir() and folder.resolve().name.startswith(_PREFIX):
        return _snapshot(folder)
    if folder.resolve().name == "snapshots" and folder.resolve().parent.name.startswith(_PREFIX):
        return _snapshot(folder.resolve().parent)
    models = sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []
    if models:
        names = ", ".join(hub_id(model) or model.name for model in models[:8]) + (", ..." if len(models) > 8 else "")
        raise ModelFormatError(
            f"`{folder}` is the hub's cache of {len(models)} models: {names}",
            f"give one of them, such as {folder / models[0].name}",
        )
    return folder


def hub_id(folder: Path) -> str | None:
    """Return `ORG/NAME` for a model's cache folder or one inside it; None for any other folder."""
    parts = [part for part in folder.absolute().parts if part.startswith(_PREFIX)]
    return parts[-1].removeprefix(_PREFIX).replace("--", "/") if parts else None


def _snapshot(folder: Path) -> Path:
    reference = folder / "refs" / "main"
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
        if commit and (folder / "snapshots" / commit).is_dir():
            return folder / "snapshots" / commit
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise ModelFormatError(
            f"`{folder}` holds no downloaded snapshot of {hub_id(folder)}", f"fetch it: `hf download {hub_id(folder)}`"
        )
    raise ModelFormatError(
        f"`{folder}` holds {len(snapshots)} snapshots and no refs/main: {', '.join(path.name for path in snapshots)}",
        f"give one of them, such as {snapshots[-1]}",
    )
