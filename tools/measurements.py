"""Keep what a benchmark printed, and write the index and the tables of docs/measurements from what is kept.

python tools/measurements.py record NAME -- python benchmarks/real_model.py FOLDER --json
python tools/measurements.py write

`record` runs the command, whose last line of output is one JSON object, and keeps it with machine and commit in
docs/measurements/results/NAME.json. `write` fills the index from claims.json, and in every page what stands between
`<!-- result NAME -->` and `<!-- end -->`. A claim whose figures are kept says where in them its number stands.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from edge_runtime import strict_json

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "measurements"
RESULT = re.compile(r"(<!-- result ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
INDEX = re.compile(r"(<!-- index -->\n).*?(<!-- end -->)", re.DOTALL)


def record(name: str, command: list[str]) -> Path:
    """Run a benchmark and keep what it printed; return the file.

    Raises:
        CalledProcessError: The command failed.
    """
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    kept = {
        "command": shlex.join(_without_folders(word) for word in command),
        "commit": commit.stdout.decode().strip(),
        "date": datetime.date.today().isoformat(),
        "result": json.loads(done.stdout.splitlines()[-1]),
    }
    path = DOCS / "results" / f"{name}.json"
    path.write_text(strict_json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def pages() -> dict[Path, str]:
    """Return every page of docs/measurements as its results say it should be."""
    written = {}
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        text = RESULT.sub(lambda found: found[1] + result_table(read_result(found[2])) + found[3], text)
        written[path] = INDEX.sub(lambda found: found[1] + index_table() + found[2], text)
    return written


def read_result(name: str) -> dict[str, Any]:
    """Return what `record` kept under a name."""
    content: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def result_table(kept: dict[str, Any]) -> str:
    """Return the figures of a result as one table for each group: a row for each name."""
    tables = [f"`{kept['command']}`, commit {kept['commit']}, {kept['date']}.\n"]
    for group, values in kept["result"].items():
        if isinstance(values, dict) and group not in ("machine", "checks"):
            tables.append(f"| {group} | | |\n| --- | --- | --- |\n" + "".join(_rows(values)))
    return "\n".join(tables)


def index_table() -> str:
    """Return the index of all claims as one table."""
    lines = ["| Claim | Number | Command | Machine | Commit |\n| --- | --- | --- | --- | --- |\n"]
    for claim in json.loads((DOCS / "claims.json").read_text(encoding="utf-8")):
        number, commit, command = (claim.get(key, "") for key in ("number", "commit", "command"))
        if "result" in claim:
            kept = read_result(claim["result"])
            number, commit, command = number.format(**kept["result"]), kept["commit"], kept["command"]
        where = f"[{claim['claim']}]({claim['page']})"
        lines.append(f"| {where} | {number} | `{command}` | {claim['machine']} | {commit} |\n")
    return "".join(lines)


def _rows(values: dict[str, Any], prefix: str = "") -> list[str]:
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name}, ")
        elif isinstance(value, list) and len(value) == 3:
            rows.append(f"| {prefix}{name} | {value[0]:.4g} | {value[1]:.4g} to {value[2]:.4g} |\n")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            rows.append(f"| {prefix}{name} | {shown} | |\n")
    return rows


def _without_folders(word: str) -> str:
    """Return a path outside the project by its last part: the rest says where somebody keeps things."""
    return Path(word).name if Path(word).is_absolute() else word


def main() -> None:
    """Record one result, or write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("name")
    recording.add_argument("command", nargs="+")
    actions.add_parser("write")
    arguments = parser.parse_args()
    if arguments.action == "record":
        print(record(arguments.name, arguments.command))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
