"""Write `docs/cli.md` from the commands themselves, so that help and documentation cannot differ.

python tools/generate_cli_docs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_runtime.cli import INTERRUPTED
from edge_runtime.cli.app import COMMANDS, grouped, load_command
from edge_runtime.cli.chat import HELP

DOCS = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

INTRODUCTION = f"""\
<!-- Written by tools/generate_cli_docs.py: change the commands, then run it. -->
# The command line

`edge-run COMMAND -h` (or `edge-run help COMMAND`) says the same as this page; `edge-run --version` prints the release.

`edge-run --install-completion` lets bash, zsh, fish and PowerShell complete commands and options, from the next
terminal on. For PowerShell it also permits scripts for the current user (`Set-ExecutionPolicy`); to change nothing
but your profile there, run `edge-run --show-completion >> $PROFILE` instead.

- The model's text goes to stdout as it is generated, UTF-8 everywhere; everything else goes to stderr.
- An error is one line `error: …`, usually followed by a line `hint: …` that says what to do. `--debug`, anywhere in
  the command, also shows the traceback.
- Exit codes: 0 success, 1 failure, 2 wrong usage, {INTERRUPTED} stopped by Ctrl-C, after printing the text so far.
- Colour appears only on a terminal, and never if `NO_COLOR` is set."""

NOTES = {
    "generate": """\
The final newline of stdin is not part of the prompt, so `echo` can be used; the output ends with a newline.

`--json` prints `text`, `token_ids`, `finish_reason` (`stop`, `length` or `cancelled`), `metrics` (defined in
`edge_runtime/metrics.py`) and, with `--logprobs N`, `logprobs`: for each token its `token_id`, `token`, `logprob` and
the N most likely ones as `top`.""",
    "chat": f"""\
Commands in the chat:

```
{HELP}
```""",
    "pull": """\
Files are downloaded into `FOLDER.partial`, which is renamed once complete: `FOLDER` itself is always whole.""",
}


def render() -> str:
    """Return the text of `docs/cli.md`."""
    return "\n\n".join([INTRODUCTION, *(_section(name) for name in COMMANDS)]) + "\n"


def _section(name: str) -> str:
    command = load_command(name)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(
        ["edge-run", name, *(p.metavar if p.required else f"[{p.metavar}]" for p in arguments), "[OPTIONS]"]
    )
    parts = [f"## edge-run {name}", f"```\n{usage}\n```", command.help.strip()]
    parts += [NOTES[name]] if name in NOTES else []
    for title, parameters in grouped(command.params).items():
        parts.append(_table(title, parameters, command.help_texts))
    return "\n\n".join(parts)


def _table(title: str, parameters: list[Any], help_texts: dict[str, str]) -> str:
    rows = [f"| {title} | | Default |", "| --- | --- | --- |"]
    for parameter in parameters:
        cells = (f"`{_usage(parameter)}`", help_texts[parameter.name], _default(parameter))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    flags = ", ".join(parameter.opts)
    return flags if parameter.is_flag else f"{flags} {parameter.metavar or parameter.name.upper()}"


def _default(parameter: Any) -> str:
    is_said = not isinstance(parameter.default, bool) and isinstance(parameter.default, (str, int, float))
    return f"`{parameter.default}`" if is_said else ""


if __name__ == "__main__":
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(render(), encoding="utf-8", newline="\n")
