"""`edge-run export`: convert a Hugging Face or ONNX model into a folder that the other commands run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli import console
from edge_runtime.cli.options import ADVANCED

if TYPE_CHECKING:
    from edge_export.cats.calibrate import Sparsity
    from edge_export.convert import ExportReport

_STRUCTURE = "Structure"


def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hugging Face or LoRA folder or hub id, or an ONNX file or folder.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Output folder; by default ./NAME-WEIGHTS.")
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="TYPE", help="Precision of the stored weights: f32, f16, bf16, int8 or int4.")
    ] = "int8",
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Size of a quantisation group of int4 weights; -1 gives each channel one scale; "
            "by default the largest up to 128 that fits every layer.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric",
            help="Quantise int8 and int4 weights without zero points, as NPUs need.",
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder or hub id of the model that a LoRA folder is merged into; by default the folder it names.",
        ),
    ] = None,
    calibration_text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file to calibrate int4 weights or --cats thresholds on.")
    ] = None,
    calibration_method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Calibration of int4 weights: gptq, or awq, which is four times as fast and less exact; by default "
            "gptq, with --cats none.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    mlp: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="stock, or fused, which runs each gated MLP as one op and needs bf16, int8 or int4 weights.",
            rich_help_panel=_STRUCTURE,
        ),
    ] = "stock",
    cats: Annotated[
        float | None,
        typer.Option(
            metavar="K",
            help="Skip this fraction of the MLP neurons at each token, from 0 to 1; implies --mlp fused.",
            rich_help_panel=_STRUCTURE,
        ),
    ] = None,
    cats_method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Thresholds of --cats: one for each layer (cats) or one for each neuron (chess).",
            rich_help_panel=ADVANCED,
        ),
    ] = "cats",
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Sparse attention pattern of the layers, such as longgen, s2:stride=8 or window:window=4096.",
            rich_help_panel=_STRUCTURE,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an exported model at the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Convert a language model. The result is compared with its source before the output folder appears."""
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
            mlp=mlp,
            cats=cats,
            cats_method=cats_method,
            attention=attention,
            base=base,
            overwrite=overwrite,
            progress=lambda stage, done, total: progress.update(task, description=stage, completed=done),
        )
    if as_json:
        console.write_json(_as_json(report))
    else:
        print(_line(report))
        for note in report.notes:
            console.note(note)
        if report.sparsity:
            _note_sparsity(report.sparsity)
        if attention:
            console.note(
                "exported without fine-tuning: sparse layers cannot attend beyond their window, so quality may drop"
            )
        console.note_trial(folder)


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
        "default_verification": asdict(report.default_verification),
        "mlp": manifest.mlp and asdict(manifest.mlp),
        "attention": manifest.attention and manifest.attention.to_json(),
        "notes": list(report.notes),
        "sparsity": report.sparsity and _sparsity_as_json(report.sparsity),
    }


def _sparsity_as_json(sparsity: Sparsity) -> dict[str, Any]:
    return {"realised": list(sparsity.realised), "effect": asdict(sparsity.effect)}


def _note_sparsity(sparsity: Sparsity) -> None:
    """Say which share of its neurons each layer skips on text it was not calibrated on, and what that does."""
    for layer, share in enumerate(sparsity.realised):
        console.note(f"layer {layer}: {share:.1%} of the neurons skipped on held-out text")
    shares, effect = sparsity.realised, sparsity.effect
    console.note(
        f"all layers: mean {sum(shares) / len(shares):.1%}, {min(shares):.1%} to {max(shares):.1%}; skipping alone: "
        f"error {effect.error:.1e}, same most likely token at {effect.top1_agreement:.1%}, "
        f"KL {effect.kl_divergence:.1e}"
    )


def _line(report: ExportReport) -> str:
    manifest, verification = report.manifest, report.verification
    return (
        f"{report.output}: {manifest.weights}, {(manifest.num_parameters or 0) / 1e6:,.1f} M parameters, "
        f"{report.num_bytes / 1e6:,.1f} MB on disk; "
        f"same most likely token as the source at {verification.top1_agreement:.1%} of "
        f"{verification.num_positions} positions, {report.default_verification.top1_agreement:.1%} at default "
        f"precision; relative error of the logits {verification.error:.1e}"
    )
