"""`edge-run export`: convert a Hugging Face or ONNX model into a folder that the other commands run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli import console

if TYPE_CHECKING:
    from edge_export.convert import ExportReport


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Model folder, hub id, or ONNX file or folder.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="To make; by default ./NAME-WEIGHTS.")
    ] = None,
    weights: Annotated[str, typer.Option(metavar="TYPE", help="fp32, fp16, int8 or int4.")] = "int8",
    group_size: Annotated[
        int, typer.Option(metavar="N", help="int4: weights that share a scale; -1 for whole channels.")
    ] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="int8, int4: no zero points, as NPUs need.")] = False,
    calibration_text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="int4: fit the weights to how the model reads this text.")
    ] = None,
    calibration_method: Annotated[
        str, typer.Option(metavar="NAME", help="gptq, or awq: less exact, four times as fast.")
    ] = "gptq",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a language model; the result is checked against its source before the folder appears."""
    from edge_export.convert import STAGES, export_model
    from edge_export.extra import require_export_extra

    require_export_extra()
    folder = output or Path(f"{_name(source)}-{weights}")
    with console.progress() as progress:
        task = progress.add_task("", total=len(STAGES))
        report = export_model(
            source,
            folder,
            weights=weights,
            group_size=group_size,
            symmetric=symmetric,
            calibration_text=calibration_text,
            calibration_method=calibration_method,
            overwrite=overwrite,
            progress=lambda stage, done, total: progress.update(task, description=stage, completed=done),
        )
    if as_json:
        console.write_json(_as_json(report))
    else:
        print(_line(report))
        console.note(f'try it: edge-run generate -m {folder} "Once upon a time"')


def _name(source: str) -> str:
    """Return the last part of a path or hub id, without `.onnx`."""
    path = Path(source).resolve() if Path(source).exists() else Path(source)
    return path.stem if path.suffix == ".onnx" else path.name


def _as_json(report: ExportReport) -> dict[str, Any]:
    manifest = report.manifest
    return {
        "output": str(report.output),
        "architecture": manifest.architecture,
        "weights": manifest.weights,
        "group_size": manifest.group_size,
        "num_parameters": manifest.num_parameters,
        "bytes": report.num_bytes,
        "verification": asdict(report.verification),
    }


def _line(report: ExportReport) -> str:
    manifest, verification = report.manifest, report.verification
    return (
        f"{report.output}: {manifest.weights}, {(manifest.num_parameters or 0) / 1e6:,.1f} M parameters, "
        f"{report.num_bytes / 1e6:,.1f} MB, error {verification.error:.1e}, "
        f"same first choice at {verification.top1_agreement:.1%} of {verification.num_positions} positions"
    )
