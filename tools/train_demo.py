"""Train the embedded default pair: tokenizer, target, then its draft with `edge-run train draft`'s own pipeline.

    python tools/train_demo.py --books FOLDER --stories FOLDER -o WORK

Books and stories are public-domain and CDLA-Sharing texts, the code is the running Python's own standard library;
edge_runtime/demo/README.md names them and says what came out. Everything is resumable: run the same command again.
WORK/target-int8 and WORK/aligned/openvino are what the package carries: the draft is aligned twice, on other answers.
WORK/prompts.jsonl has beginnings of windows that neither was trained on, for `edge-run bench draft`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_export import corpus
from edge_export.convert import export_model
from edge_export.fastdraft.recipe import DraftRecipe
from edge_export.fastdraft.stages import train_draft
from edge_export.one_epoch import Ledger
from edge_export.quiet import quiet
from edge_export.train import Progress, TrainConfig, best_precision, train
from edge_runtime import strict_json

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE, CONTEXT = 8192, 1024
WIDTH, FFN, LAYERS, HEADS = 256, 704, 6, 4
DRAFT_SIZE, DRAFT_LAYERS = 740e3, 4
NUM_PROMPTS, PROMPT_TOKENS = 140, 48
SHARES = {"text": 0.55, "code": 0.45}
ROUNDS = "the target's budget, each token seen once; several: of rounds, each with a rise and decay of its own"
LAST_IN_CODE = ("test", "tests", "pydoc_data", "encodings")
"""Folders of the standard library that come last: tests, tables and manuals are not what a user's code looks like."""


def code_files() -> list[Path]:
    """Return the standard library's sources, library modules before tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    return sorted(files, key=lambda path: any(part in LAST_IN_CODE for part in path.relative_to(root).parts))


def make_tokenizer(files: Sequence[Path], out: Path) -> Tokenizer:
    """Return the tokenizer, trained on the files where `out` has none."""
    if not (out / "tokenizer.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        corpus.train_bpe(files, VOCAB_SIZE, END_OF_TEXT).save(str(out / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": CONTEXT}
        (out / "tokenizer_config.json").write_text(strict_json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def text_paths(arguments: argparse.Namespace) -> tuple[Path, ...]:
    """Return the folders of text, simple texts first: the target's budget ends before the last of them."""
    return (arguments.books / "children", arguments.stories, arguments.books / "adult")


def windows_of(kind: str, arguments: argparse.Namespace, tokenizer: Tokenizer) -> tuple[corpus.Windows, corpus.Windows]:
    """Return the windows of text or code to train on, in the order of the files, and those held out."""
    files = corpus.text_files(text_paths(arguments)[:2]) if kind == "text" else code_files()
    return corpus.split(corpus.cut(corpus.tokenize(files, tokenizer, end_of_text=0), CONTEXT))


def target_windows(arguments: argparse.Namespace, tokenizer: Tokenizer, tokens: int) -> corpus.Windows:
    """Return training windows in order: text and code in fixed shares, as many as the budget holds."""
    wanted = tokens // CONTEXT
    parts = []
    for kind, share in SHARES.items():
        windows, _ = windows_of(kind, arguments, tokenizer)
        parts.append((windows if kind == "text" else windows[: int(wanted * share)], share))
    return corpus.mix(parts, seed=0)[:wanted]


def write_prompts(arguments: argparse.Namespace, tokenizer: Tokenizer, path: Path) -> None:
    """Write beginnings of windows that were held out, with their category."""
    if path.is_file():
        return
    lines = []
    for kind in SHARES:
        _, held_out = windows_of(kind, arguments, tokenizer)
        for window in corpus.shuffled(held_out, seed=0)[:NUM_PROMPTS]:
            prompt = tokenizer.decode(window[:PROMPT_TOKENS].tolist())
            lines.append(strict_json.dumps({"category": kind, "prompt": prompt}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def model_of_target() -> Any:
    """Return the untrained target: untied embeddings, whose input half costs no time."""
    with quiet():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
        return LlamaForCausalLM(config)


def show(progress: Progress) -> None:
    """Print a line now and then."""
    if progress.step % 20 == 0 or progress.step == progress.num_steps:
        left = (progress.num_steps - progress.step) * (time.monotonic() - STARTED) / max(1, progress.step)
        print(
            f"{progress.step}/{progress.num_steps} loss {progress.loss:.3f} {progress.tokens_per_second:.0f} tokens/s "
            f"{left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )


def show_draft(stage: str, done: int, wanted: int, figure: str) -> None:
    """Print a line now and then."""
    if done % max(1, wanted // 20) == 0 or done == wanted:
        print(f"draft {stage} {done}/{wanted} {figure}", file=sys.stderr, flush=True)


def rounds_of(arguments: argparse.Namespace, tokenizer: Tokenizer, out: Path) -> Iterator[corpus.Windows]:
    """Yield the windows of each round of the target's training; none of them was in an earlier round."""
    total, seen = 0, Ledger(out / "none")
    for tokens in arguments.tokens:
        total += tokens
        make = functools.partial(target_windows, arguments, tokenizer, total)
        windows = corpus.load_or_make(out / f"windows-{total}.npy", make)
        new = windows[[window not in seen for window in windows]]
        seen.record(new)
        yield new


def train_target(arguments: argparse.Namespace, out: Path) -> Path:
    """Return the target's int8 model folder."""
    if (out / "target-int8").is_dir():
        return out / "target-int8"
    children = corpus.text_files(text_paths(arguments)[:2])
    tokenizer = make_tokenizer([*children, *code_files()], out / "tokenizer")
    config = TrainConfig(batch_size=4, micro_batch_size=2, learning_rate=5e-3, precision=best_precision(), warmup=0.03)
    model = model_of_target()
    for number, windows in enumerate(rounds_of(arguments, tokenizer, out), 1):
        model = train(model, windows, out / f"target-run-{number}", config, on_step=show)
    with quiet():
        model.save_pretrained(out / "target")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "target" / name).write_bytes((out / "tokenizer" / name).read_bytes())
    export_model(out / "target", out / "target-int8", weights="int8")
    write_prompts(arguments, tokenizer, out / "prompts.jsonl")
    return out / "target-int8"


def main() -> int:
    """Train both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder with children/ and adult/")
    parser.add_argument("--stories", type=Path, required=True, help="folder of short stories")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000_000], help=ROUNDS)
    parser.add_argument("--draft-tokens", type=float, default=8e6, help="of each of the draft's two stages of text")
    parser.add_argument("--answer-tokens", type=float, default=2.5e6, help="that the target writes for the draft")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = DraftRecipe(
        target=str(train_target(arguments, arguments.output)),
        text=text_paths(arguments),
        code=tuple(code_files()),
        size=DRAFT_SIZE,
        num_layers=DRAFT_LAYERS,
        max_tokens=arguments.draft_tokens,
        answer_tokens=arguments.answer_tokens,
        batch_size=4,
        loss="kl",
    )
    draft = train_draft(recipe, arguments.output / "draft", show_draft)
    again = dataclasses.replace(recipe, start=draft, stages=("align",), seed=1)
    train_draft(again, arguments.output / "aligned", show_draft)
    return 0


STARTED = time.monotonic()

if __name__ == "__main__":
    raise SystemExit(main())
