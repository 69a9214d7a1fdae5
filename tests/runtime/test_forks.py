"""A forked process cannot use the models of its parent: it is told so in one line, and can end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from edge_runtime import EdgeLLM
from edge_runtime.errors import EdgeError
llm = EdgeLLM.load()
stream = llm.stream("Once upon", max_new_tokens=5)
next(stream)
if os.fork() == 0:
    for request in (lambda: llm.generate("Once"), lambda: next(stream), stream.close):
        try:
            request()
        except EdgeError as error:
            print(error)
    sys.exit(3)
print("child:", os.waitstatus_to_exitcode(os.wait()[1]))
print("parent:", stream.finish().finish_reason)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_request_in_a_forked_process_is_refused():
    """It waited for ever for threads that were not copied, and so did the end of the process."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    made = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    refused = "the model was loaded before this process was forked, and cannot run in the fork"
    assert made.stdout.splitlines() == [refused, refused, "child: 3", "parent: length"], made.stderr
