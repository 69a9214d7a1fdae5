"""A checkpoint or ONNX file becomes a folder that `edge_runtime` loads.

    report = export_model("checkpoint-folder", Path("model"), weights="int4")

Five stages: read, convert (to a stateful graph with one attention op per layer), compress, verify (against the source,
through the runtime's own loader), write. The folder appears at the end, or not at all.

Not here: how each architecture is traced (optimum-intel) and how weights are rounded (NNCF).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

import edge_runtime
import ov_kernels
from edge_export import onnx_source, torch_source, verify
from edge_export.cats import MlpFormat
from edge_export.cats.calibrate import Sparsity, sparsify
from edge_export.cats.finetune import THRESHOLDS_NAME, read_thresholds
from edge_export.cats.rewrite import Thresholds, fuse_mlps
from edge_export.compress import (
    LARGEST_GROUP,
    SPELLINGS,
    WeightFormat,
    calibration_windows,
    check_groups,
    compress,
    with_group,
)
from edge_export.families import check_family
from edge_export.hybrid.patterns import CONFIG_ENTRY, check_fits, check_words, of_config, parse_pattern, shape_of
from edge_export.hybrid.torch_attention import patterned
from edge_export.quiet import quiet
from edge_export.sources import Source, load_config, open_source
from edge_export.staging import check_free_disk, staged
from edge_export.tokenizer_files import check_tokenizer, save_tokenizer
from edge_export.verify import Verification
from edge_runtime import strict_json
from edge_runtime.devices import core
from edge_runtime.errors import ConfigError, EdgeError, ExportError
from edge_runtime.manifest import MODEL_NAME, Manifest, load_manifest
from edge_runtime.models.attention import AttentionPattern
from edge_runtime.models.passes.paged_attention import first_line
from edge_runtime.outputs import check_apart, check_output
from edge_runtime.text.tokenizer import Tokenizer
from edge_runtime.text.turn_ends import further_ends

STAGES = ("read", "convert", "compress", "verify", "write")
Progress = Callable[[str, int, int], None]
"""Called as each stage begins: its name, how many stages are done, how many there are."""

_BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.1, "int4": 0.8}
_MADE_WITH = ("openvino", "optimum-intel", "transformers", "torch", "nncf")


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was made.

    Attributes:
        output: The model folder.
        manifest: Its edge_model.json.
        num_bytes: Bytes of all files in the folder.
        verification: How it compares with its source in f32; where neurons are skipped, with a source that skips them
            too.
        default_verification: That comparison at the default precision of this CPU.
        sparsity: What skipping neurons does; None without `cats`.
        notes: Lines on what was decided for the user on the way.
    """

    output: Path
    manifest: Manifest
    num_bytes: int
    verification: Verification
    default_verification: Verification
    sparsity: Sparsity | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """What the exported model is to be compared with."""

    token_ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    num_parameters: int
    sparsity: Sparsity | None = None


def export_model(
    source: str | Path,
    output: str | Path,
    *,
    weights: str = "int8",
    group_size: int | None = None,
    symmetric: bool = False,
    calibration_text: str | Path | None = None,
    calibration_method: str | None = None,
    mlp: str = "stock",
    cats: float | None = None,
    cats_method: str = "cats",
    attention: str | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Convert a causal language model into a model folder.

    Args:
        source: A Hugging Face or LoRA folder or hub id, or an ONNX file or folder with config.json and tokenizer beside
            it.
        output: The folder to make.
        weights: `f32`, `f16`, `bf16`, `int8` or `int4`; `fp32` and `fp16` are the same as `f32` and `f16`.
        group_size: Weights that share a scale, with int4; -1 for whole output channels, None for as many as fit
            every layer, up to 128.
        symmetric: No zero points in int8 and int4: somewhat less exact, but what NPUs run.
        calibration_text: A text file like what the model will read; int4 weights are fitted to it, or `cats` finds its
            thresholds there.
        calibration_method: `gptq`, or `awq`, which is faster. None is gptq, and with `cats` no fitting of int4 weights,
            which takes hours for a billion of them.
        mlp: `stock`, or `fused` for gated MLPs as one op of ours each, with bf16, int8 or int4.
        cats: Share of the MLPs' neurons to skip at each token, between 0 and 1; implies `fused`.
        cats_method: `cats` for one threshold in each layer, `chess` for one for each neuron.
        attention: What the layers see, in the words of `hybrid.patterns`; None for what the source says.
        base: Folder or hub id of the model that a LoRA folder is merged into; None for the folder that it names.
        overwrite: Replace a model folder of ours that exists.
        progress: Called as each stage begins.

    Raises:
        ConfigError: An option has a value that cannot be used, the output exists, or it and the source are not apart.
        ExportError: The source cannot be converted, or the result differs from it.
        DownloadError: `source` is a hub id and the hub does not give it out.
        ExtensionError: `fused` was asked for and ov_kernels is not compiled.
    """
    output, weights = Path(output), SPELLINGS.get(weights, weights)
    form = WeightFormat(
        weights=weights, group_size=group_size, symmetric=symmetric, calibration_method=calibration_method or "gptq"
    )
    mlp_form = MlpFormat(mlp=mlp, cats=cats, cats_method=cats_method)
    mlp_form.check_weights(weights)
    mlp_form.check_calibration(calibration_text)
    if calibration_text and weights != "int4" and cats is None:
        raise ConfigError(f"calibration_text has no effect on {weights} weights", "add --weights int4 or --cats")
    check_apart(output, source=source, calibration_text=calibration_text)
    check_output(output, overwrite=overwrite)
    if mlp_form.is_fused:
        ov_kernels.add_to(core(), required=True)

    def stage(name: str) -> AbstractContextManager[None]:
        if progress:
            progress(name, STAGES.index(name), len(STAGES))
        return quiet()

    with _one_line_errors(str(source)), staged(output, overwrite=overwrite) as folder:
        with stage("read"):
            origin = open_source(source, base)
            check_apart(output, source=origin.onnx or origin.folder)
            if origin.adapter:
                check_apart(output, adapter=origin.adapter.folder)
            mlp_form, thresholds = _trained_thresholds(origin, mlp_form)
            _check_early(origin, form, mlp_form, attention)
            check_free_disk(output, _disk_bytes(origin, weights))
            text = _calibration_text(calibration_text)
            config = load_config(origin)
            pattern = _pattern(config, attention)
            saved = save_tokenizer(origin.of_tokenizer, folder)
            tokenizer = saved.tokenizer
            _save_configs(origin, folder)
            windows = _calibration_windows(text, tokenizer, config)
            if thresholds is None:
                mlp_form.check_text(windows)
        with stage("convert"):
            token_ids = verify.prompt_ids(tokenizer, _context_length(config))
            model, reference = _convert(
                origin, weights, token_ids, folder / "work", windows, mlp_form, thresholds, pattern
            )
            verify.check_windows(model, config)
        with stage("compress"):
            is_fitted = weights == "int4" and (cats is None or calibration_method is not None)
            form = with_group(model, form, is_fused=mlp_form.is_fused)
            model = compress(model, form, windows if is_fitted else ())
            if mlp_form.is_fused:
                fuse_mlps(model, reference.sparsity.thresholds if reference.sparsity else None)
            ov.save_model(model, folder / MODEL_NAME, compress_to_fp16=False)
            del model  # the runtime is about to load it again
            manifest, end_notes = _with_turn_ends(
                _manifest(folder, origin, config, reference, form, mlp_form, pattern), folder, tokenizer
            )
            manifest = manifest.save(folder)
        with stage("verify"):
            verification = verify.verify_logits(folder, manifest, reference.token_ids, reference.logits)
            at_default = verify.verify_default(folder, manifest, reference.token_ids, reference.logits)
        with stage("write"):
            shutil.rmtree(folder / "work", ignore_errors=True)
            num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(
        output=output,
        manifest=manifest,
        num_bytes=num_bytes,
        verification=verification,
        default_verification=at_default,
        sparsity=reference.sparsity,
        notes=(*origin.notes(weights), *_group_notes(group_size, form), *saved.notes, *end_notes),
    )


@contextlib.contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    """Turn whatever the libraries raise into an ExportError; the original stays attached for `--debug`."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as error:  # torch, optimum, nncf and openvino raise bare exceptions of every kind
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad alloc" in str(error):
            raise ExportError(f"not enough memory to export `{source}`", "close other programs") from error
        told = first_line(_root(error)) if str(error) else type(error).__name__
        raise ExportError(f"`{source}` cannot be exported: {told}", "`--debug` shows where it failed") from error


def _root(error: Exception) -> Exception:
    """Return the error that the first library raised, which later ones wrap in advice."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _check_early(source: Source, form: WeightFormat, mlp_form: MlpFormat, attention: str | None) -> None:
    """Refuse what the source's files and config.json rule out, before the seconds that torch takes to be imported."""
    check_family(source)
    check_tokenizer(source.of_tokenizer)
    mlp_form.check_weights(form.weights)
    check_groups(form, source.config, is_fused=mlp_form.is_fused)
    if source.onnx and mlp_form.cats is not None:
        raise ExportError("cats needs a PyTorch model, but the source is an ONNX graph", "export the original folder")
    if attention is not None:
        if source.onnx:
            raise ExportError(
                "attention needs a PyTorch model, but the source is an ONNX graph", "export the original folder"
            )
        check_words(attention, source.config)


def _disk_bytes(source: Source, weights: str) -> int:
    """Estimate the bytes of the finished folder and of the uncompressed graph that is kept until the end."""
    stored = 2 if source.is_sixteen_bit else 4
    graph = 0.0 if source.onnx else 4.0 if weights == "fp32" else stored
    return int(source.weight_bytes / stored * (graph + _BYTES_PER_WEIGHT[weights]))


def _save_configs(source: Source, folder: Path) -> None:
    """Write what describes the model; transformers would fill in the family's defaults, tokens that end answers too."""
    (folder / "config.json").write_text(strict_json.dumps(source.merged_config, indent=2) + "\n", encoding="utf-8")
    if (source.folder / "generation_config.json").is_file():
        shutil.copyfile(source.folder / "generation_config.json", folder / "generation_config.json")


def _context_length(config: Any) -> int | None:
    """Return the tokens for which the exported graph is right.

    longrope (Phi-3 with 128k) has one set of frequencies up to the length of its first training and another beyond, for
    all tokens of a text. The graph can only look at the tokens of one step, so keys of both kinds would meet in a
    longer text; PyTorch computes all keys anew at that point.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return getattr(config, "max_position_embeddings", None)


def _calibration_text(path: str | Path | None) -> str | None:
    try:
        return None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration_text `{path}` cannot be read: {error}", "give a UTF-8 text file") from error


def _calibration_windows(text: str | None, tokenizer: Tokenizer, config: Any) -> list[list[int]]:
    return [] if text is None else calibration_windows(tokenizer.encode(text), _context_length(config))


def _convert(
    source: Source,
    weights: str,
    token_ids: NDArray[np.int64],
    work: Path,
    windows: list[list[int]],
    mlp_form: MlpFormat,
    thresholds: Thresholds | None,
    pattern: AttentionPattern | None,
) -> tuple[ov.Model, _Reference]:
    """Return the graph before compression, and what the source says to `token_ids`."""
    if source.onnx:
        model = onnx_source.load(source)
        reference = _Reference(
            token_ids=token_ids,
            logits=onnx_source.reference_logits(model, token_ids),
            num_parameters=onnx_source.num_parameters(source),
        )
        onnx_source.to_stateful(model)
    else:
        torch_source.check_supported(source)
        checkpoint = torch_source.load(source, weights)
        with patterned(checkpoint, pattern):
            reference = _Reference(
                token_ids=token_ids,
                logits=torch_source.reference_logits(checkpoint, token_ids),
                num_parameters=torch_source.num_parameters(checkpoint),
            )
            if mlp_form.cats is not None:
                sparsity, logits = sparsify(checkpoint, windows, mlp_form, token_ids, reference.logits, thresholds)
                reference = dataclasses.replace(reference, logits=logits, sparsity=sparsity)
        model = torch_source.to_ir(checkpoint, work, weights)
    if model.has_rt_info("runtime_options"):
        # optimum writes KV_CACHE_PRECISION=f16 here, which would override the plugin's and the user's choice.
        del model.get_rt_info()["runtime_options"]
    return model, reference


def _pattern(config: Any, words: str | None) -> AttentionPattern | None:
    """Return what the layers are to see; None where the graph itself says it, or they see everything.

    Raises:
        ConfigError: The words or the config say what the model cannot have.
    """
    if words is None:
        entry = getattr(config, CONFIG_ENTRY, None)
        return AttentionPattern.from_json(entry) if entry else None
    if of_config(config) is not None:
        raise ConfigError("the model already has an attention pattern", "export it without --attention")
    layers, _, kv_heads = shape_of(config)
    pattern = parse_pattern(words, layers, kv_heads)
    check_fits(pattern, config)
    return pattern


def _trained_thresholds(source: Source, form: MlpFormat) -> tuple[MlpFormat, Thresholds | None]:
    """Return the thresholds that a model was trained with, where it was and no others are asked for."""
    if form.cats is not None or not (source.folder / THRESHOLDS_NAME).is_file():
        return form, None
    share, method, thresholds = read_thresholds(source.folder)
    ov_kernels.add_to(core(), required=True)
    return MlpFormat(mlp="fused", cats=share, cats_method=method), thresholds


def _group_notes(wanted: int | None, form: WeightFormat) -> list[str]:
    """Say which quantisation group was chosen where the usual one does not fit."""
    if form.weights != "int4" or wanted is not None or form.group_size == LARGEST_GROUP:
        return []
    groups = "whole channels" if form.group_size == -1 else f"groups of {form.group_size} weights"
    return [f"int4: {groups} share a scale, since groups of {LARGEST_GROUP} do not fit every layer"]


def _manifest(
    folder: Path,
    source: Source,
    config: Any,
    reference: _Reference,
    form: WeightFormat,
    mlp_form: MlpFormat,
    pattern: AttentionPattern | None,
) -> Manifest:
    """Say what the runtime must know: tokens that end an answer as it reads them itself, and what only we know."""
    return dataclasses.replace(
        load_manifest(folder),
        context_length=_context_length(config),
        vocab_size=int(reference.logits.shape[-1]),
        weights=form.weights,
        group_size=form.group_size if form.weights == "int4" else None,
        num_parameters=reference.num_parameters,
        source=source.name,
        mlp=mlp_form.facts,
        attention=pattern,
        versions={"edge-runtime": edge_runtime.__version__, **{name: version(name) for name in _MADE_WITH}},
    )


def _with_turn_ends(manifest: Manifest, folder: Path, tokenizer: Tokenizer) -> tuple[Manifest, list[str]]:
    """Return a manifest with every token that ends an answer, and lines on what its configs do not say."""
    further = further_ends(folder, manifest.eos_token_ids, tokenizer)
    ends = (*manifest.eos_token_ids, *further)
    if not ends:
        return manifest, ["warning: the model names no token that ends an answer: answers run to their length limit"]
    notes = [f"answers also end at `{tokenizer.token(i)}` (id {i}), named by {place}" for i, place in further.items()]
    return dataclasses.replace(manifest, eos_token_ids=ends), notes
