"""A forked process has the models in its memory, but not the threads that compute them: it is told so, and can end.

There a request would wait for ever, and so would the destructor of a compiled model.
"""

from __future__ import annotations

import ctypes
import os
import weakref

from edge_runtime.errors import EdgeError

_loaded: weakref.WeakSet[HomeProcess] = weakref.WeakSet()


class HomeProcess:
    """The process in which something was loaded.

    Args:
        loaded: Never destroyed in a fork of it.
    """

    def __init__(self, loaded: object) -> None:
        self._id = os.getpid()
        self._loaded = loaded
        _loaded.add(self)

    @property
    def is_here(self) -> bool:
        """Whether this is the process, and not a fork of it."""
        return os.getpid() == self._id

    def check(self) -> None:
        """Refuse to go on in a fork of the process.

        Raises:
            EdgeError: It is one.
        """
        if not self.is_here:
            raise EdgeError(
                "the model was loaded before this process was forked, and cannot run in the fork",
                "load it in the new process, or start that with multiprocessing's `spawn`",
            )

    def keep(self) -> None:
        """Let nothing destroy what was loaded, not even the end of the interpreter."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._loaded))


def _keep_all() -> None:
    for home in _loaded:
        home.keep()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
