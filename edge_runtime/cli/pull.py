"""`edge-run pull`: download an OpenVINO model folder from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.cli import console
from edge_runtime.cli.running import in_background


def pull(
    hub_id: Annotated[
        str,
        typer.Argument(metavar="HUB_ID", help="Model on the Hugging Face hub, such as OpenVINO/Qwen3-0.6B-int4-ov."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Output folder; by default ./NAME.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the model to download.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Download an OpenVINO model from the Hugging Face hub; run it again to fetch the missing files after a failure."""
    from edge_runtime import hub

    pulled = in_background(lambda: hub.pull(hub_id, output, revision))
    if as_json:
        console.write_json({"folder": str(pulled.folder), "source": hub_id, "revision": pulled.revision})
    else:
        print(pulled.folder)
        console.note_trial(pulled.folder)
