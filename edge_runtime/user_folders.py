"""The user's folders of this project, as each system has them; they need not exist."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return where things are kept that can be made again."""
    if sys.platform == "win32":
        return _local_app_data()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edge-run"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-run"


def data_folder() -> Path:
    """Return where things are kept that cannot be made again."""
    if sys.platform == "win32":
        return _local_app_data()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "edge-run"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "edge-run"


def _local_app_data() -> Path:
    return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edge-run"
