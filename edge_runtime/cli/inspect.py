"""`edge-run inspect`: what a model folder holds, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli import console

if TYPE_CHECKING:
    from edge_runtime.manifest import Manifest
    from edge_runtime.models.attention import AttentionPattern, LayerPattern

LONGEST_SHOWN = 131_072
PICTURED_BLOCKS = 128


def inspect(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Model folder; by default the embedded target.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw which tokens each layer's heads attend to, as a png, svg or pdf file."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=1 << 20, help="Number of tokens drawn by --plot; by default 128 KV blocks."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the model's files in full and compare them with their checksums.")
    ] = False,
) -> None:
    """Show a model's weights, layers and attention patterns, and the memory of keys and values by context length."""
    from edge_runtime.bench.attention_plot import save_pattern_plot
    from edge_runtime.bench.plot import check_plot
    from edge_runtime.checksums import check_sizes
    from edge_runtime.demo import or_demo
    from edge_runtime.hub_cache import resolve
    from edge_runtime.manifest import load_manifest
    from edge_runtime.models.attention import FULL, AttentionPattern

    folder = resolve(Path(or_demo(model, None)[0]))
    if plot:
        check_plot(plot, model=folder)
    manifest = load_manifest(folder)
    check_sizes(folder, manifest.files)
    if verify:
        _verify(folder, manifest)
    shape = _shape(folder)
    attention = manifest.attention or AttentionPattern.of_layers([FULL] * shape["num_layers"])
    report = {**_report(folder, manifest, shape, attention), "checksums": _checksums(manifest, verify)}
    if as_json:
        console.write_json(report)
    else:
        _print_report(report, attention)
    if plot:
        tokens = context or PICTURED_BLOCKS * attention.block_size
        save_pattern_plot(attention, shape["num_heads"], shape["num_kv_heads"], tokens, plot)
        console.note(f"plotted: {plot}")


def _verify(folder: Path, manifest: Manifest) -> None:
    """Refuse a model whose files are not what they were, or cannot be told to be.

    Raises:
        ModelFormatError: One is not, or nobody kept checksums.
    """
    from edge_runtime.checksums import HINT, damaged
    from edge_runtime.errors import ModelFormatError

    if not manifest.files:
        raise ModelFormatError(
            f"`{folder}` has no checksums, so its files cannot be verified",
            "`edge-run export` keeps them; other exporters and earlier versions do not",
        )
    if found := damaged(folder, manifest.files):
        names = ", ".join(f"`{folder / name}`" for name in found)
        raise ModelFormatError(f"{names}: the SHA-256 is not the one it was exported with", HINT)


def _checksums(manifest: Manifest, is_verified: bool) -> str:
    """Return `none`, `verified`, or `kept` where they were not looked at."""
    return "none" if not manifest.files else "verified" if is_verified else "kept"


def _shape(folder: Path) -> dict[str, int]:
    """Return the sizes of a model's layers, from its config.json.

    Raises:
        ModelFormatError: It does not say.
    """
    from edge_runtime.errors import ModelFormatError
    from edge_runtime.manifest import read_json

    config = read_json(folder / "config.json")
    text = config.get("text_config") or config
    try:
        layers, heads = (_first(text, *names) for names in (_LAYERS, _HEADS))
        kv_heads = text.get("num_key_value_heads") or heads
        head_size = text.get("head_dim") or _first(text, *_HIDDEN) // heads
    except KeyError as error:
        raise ModelFormatError(
            f"`{folder / 'config.json'}` has no {error}", "copy the file from the original model"
        ) from error
    return {"num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "head_size": head_size}


_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_HIDDEN = ("hidden_size", "n_embd")


_CHECKSUM_WORDS = {
    "none": "none",
    "kept": "sizes are right; --verify reads the files in full",
    "verified": "all files are as they were exported",
}


def _first(content: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(content.get(name), int):
            return int(content[name])
    raise KeyError(names[0])


def _report(folder: Path, manifest: Manifest, shape: dict[str, int], attention: AttentionPattern) -> dict[str, Any]:
    from edge_runtime.manifest import weight_bytes

    return {
        "model": str(folder),
        "architecture": manifest.architecture,
        "num_parameters": manifest.num_parameters,
        "weights": manifest.weights,
        "group_size": manifest.group_size,
        "weight_bytes": weight_bytes(folder),
        "vocab_size": manifest.vocab_size,
        "context_length": manifest.context_length,
        **shape,
        "mlp": manifest.mlp and vars(manifest.mlp),
        "attention": manifest.attention and manifest.attention.to_json(),
        "sliding_window": None if manifest.attention else _sliding_window(folder),
        "turn_ends": _turn_ends(folder, manifest),
        "kv_bytes": [_kv_bytes(tokens, shape, attention) for tokens in _contexts(manifest.context_length)],
    }


def _turn_ends(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the tokens that end an answer; their text is None where the folder has no tokenizer.json."""
    from edge_runtime.text.tokenizer import TOKENIZER_NAME, Tokenizer
    from edge_runtime.text.turn_ends import answer_ends

    if not (folder / TOKENIZER_NAME).is_file():
        return [{"id": token_id, "token": None} for token_id in manifest.eos_token_ids]
    tokenizer = Tokenizer(folder)
    return [{"id": i, "token": tokenizer.token(i)} for i in answer_ends(folder, manifest, tokenizer)]


def _sliding_window(folder: Path) -> int | None:
    """Return the window that some layers of a natively sliding family have; which ones, its graph alone says."""
    from edge_runtime.manifest import read_json

    config = read_json(folder / "config.json")
    window = (config.get("text_config") or config).get("sliding_window")
    return window if isinstance(window, int) else None


def _contexts(longest: int | None) -> list[int]:
    """Return six lengths, each twice the one before, up to the model's own."""
    last = longest or LONGEST_SHOWN
    return [last >> i for i in range(5, -1, -1) if last >> i]


def _kv_bytes(num_tokens: int, shape: dict[str, int], attention: AttentionPattern) -> dict[str, Any]:
    """Return the bytes of keys and values after so many tokens, one byte a number, without scales."""
    heads = shape["num_kv_heads"], shape["num_heads"]
    each = 2 * shape["head_size"]
    blocks = -(-num_tokens // attention.block_size) * attention.block_size
    return {
        "tokens": num_tokens,
        "bytes": each * attention.held_tokens(num_tokens, *heads),
        "bytes_if_full": each * blocks * shape["num_kv_heads"] * shape["num_layers"],
    }


def _print_report(report: dict[str, Any], attention: AttentionPattern) -> None:
    parameters = f"{report['num_parameters'] / 1e6:,.1f} M" if report["num_parameters"] else "not known"
    lines = {
        "model": report["model"],
        "architecture": report["architecture"],
        "parameters": parameters,
        "weights": f"{report['weights']}{_group_words(report['group_size'])}, {report['weight_bytes'] / 1e6:,.1f} MB",
        "vocabulary": report["vocab_size"],
        "context": f"{report['context_length'] or 'not known'} tokens",
        "layers": f"{report['num_layers']}, each with {report['num_heads']} query heads and "
        f"{report['num_kv_heads']} KV heads of size {report['head_size']}",
        "MLPs": _mlp_words(report["mlp"]),
        "turn ends": _turn_end_words(report["turn_ends"]),
        "checksums": _CHECKSUM_WORDS[report["checksums"]],
    }
    for name, value in lines.items():
        print(f"{name:14}{value}")
    for index, (pattern, layers) in enumerate(zip(attention.patterns, attention.groups, strict=True)):
        print(f"{'' if index else 'attention':14}{pattern_words(pattern)}: layers {_ranges(layers)}")
    if report["sliding_window"]:
        print(f"{'':14}except for layers with a sliding window of {report['sliding_window']:,} tokens")
    is_sparse = not all(pattern.is_full for pattern in attention.patterns)
    print(f"\n{'tokens':>10} {'keys and values, u8':>22}" + " of full attention".rjust(20) * is_sparse)
    for row in report["kv_bytes"]:
        share = f"{row['bytes'] / row['bytes_if_full']:>19.1%}" * is_sparse
        print(f"{row['tokens']:>10,} {row['bytes'] / 1e6:>19,.1f} MB{share}")


def _group_words(size: int | None) -> str:
    return "" if size is None else " by channel" if size == -1 else f" in groups of {size}"


def _turn_end_words(ends: list[dict[str, Any]]) -> str:
    if not ends:
        return "none: every answer runs to its length limit"
    return ", ".join(f"token {end['id']}" if end["token"] is None else f"{end['token']} ({end['id']})" for end in ends)


def _mlp_words(mlp: dict[str, Any] | None) -> str:
    if mlp is None:
        return "OpenVINO's own ops"
    share = mlp["activation_sparsity"]
    return "fused" if not share else f"fused, {share:.0%} of the neurons skipped ({mlp['method']})"


def pattern_words(pattern: LayerPattern) -> str:
    """Say what a layer sees."""
    if pattern.is_full:
        return "all tokens"
    parts = [f"the last {pattern.window} tokens"]
    if pattern.sink:
        parts.append(f"the first {pattern.sink}")
    if pattern.stride:
        shards = "" if len(set(pattern.offsets)) == 1 else f" ({len(set(pattern.offsets))} different shards)"
        parts.append(f"1 KV block in {pattern.stride}{shards}")
    if pattern.num_dense_heads:
        parts.append(f"all tokens in {pattern.num_dense_heads} heads")
    return ", ".join(parts)


def _ranges(layers: tuple[int, ...]) -> str:
    """Return numbers as ranges: 0-9, 22-31."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
