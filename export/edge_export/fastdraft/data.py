"""What a draft is trained on: windows of text and code, and prompts for the target.

Windows are dealt out before anything is trained: the text of the stage continue is text that the stage pretrain never
sees, so no window comes twice in the whole training. About one window in 64 is in neither (`corpus.split`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_export import corpus
from edge_export.corpus import Windows
from edge_export.fastdraft.recipe import CODE_SHARE, OWN_PROMPTS, TEXT_PROMPTS, DraftRecipe
from edge_export.fastdraft.target import Target
from edge_runtime.bench.prompts import read_prompts as read_json_prompts
from edge_runtime.errors import ConfigError

OnProgress = Callable[[str, int, int, str], None]
"""Called with the stage, what is done and wanted of it, and a figure worth showing."""

PROMPT_TOKENS = (8, 64)
"""Shortest and longest beginning of a text that the target is to continue."""
SHORTEST_SHARE = 1 / 8
"""Answers end early: there are prompts enough even if each answer had only this share of its longest."""


class TrainingText:
    """The texts of a recipe as windows of the target's tokens, kept on disk.

    Args:
        recipe: Names the files.
        target: Tokenizes them.
        work: Folder for the windows.
        is_main: Whether this process is the first.
        on_progress: Called while files are read.
    """

    def __init__(
        self, recipe: DraftRecipe, target: Target, work: Path, *, is_main: bool, on_progress: OnProgress
    ) -> None:
        self._recipe, self._target, self._work = recipe, target, work
        self._is_main, self._on_progress = is_main, on_progress
        self.window = recipe.window or target.window

    def windows(self, stage: str) -> Windows:
        """Return the windows of the stage pretrain or continue in training order, (N, T)."""
        text = self._windows_of("text", self._recipe.text)
        code = self._windows_of("code", self._recipe.code)
        reserved = min(int(len(code) * (1 / CODE_SHARE - 1)), len(text) // 3)
        if stage == "pretrain":
            windows = text[: len(text) - reserved]
        else:
            mixed = np.concatenate([code, text[len(text) - reserved :]])
            windows = corpus.shuffled(mixed, self._recipe.seed)
        most = self._recipe.max_tokens
        return windows if most is None else windows[: int(most // self.window)]

    def _windows_of(self, kind: str, paths: Sequence[Path]) -> Windows:
        """Return the shuffled training windows of some files; none without files."""
        if not paths:
            return np.zeros((0, self.window), np.uint32)
        name = corpus.fingerprint([str(path) for path in paths], self.window, self._recipe.seed)
        path = self._work / f"{kind}-{name}.npy"
        return corpus.load_or_make(path, lambda: self._cut(kind, paths), is_main=self._is_main)

    def _cut(self, kind: str, paths: Sequence[Path]) -> Windows:
        tokens = corpus.tokenize(
            corpus.text_files(paths),
            self._target.tokenizer(),
            self._target.end_of_text,
            lambda done, wanted: self._on_progress(f"read {kind}", done, wanted, ""),
        )
        windows, _ = corpus.split(corpus.cut(tokens, self.window))
        return corpus.shuffled(windows, self._recipe.seed)

    def prompts(self) -> Iterator[str | list[int] | None]:
        """Yield what the target is to answer: texts, token ids, or None for a prompt of its own."""
        recipe = self._recipe
        wanted = recipe.num_answers or max(1, int(recipe.answer_tokens / recipe.max_new_tokens / SHORTEST_SHARE))
        if recipe.prompts == OWN_PROMPTS:
            yield from [None] * wanted
        elif recipe.prompts == TEXT_PROMPTS:
            yield from self._beginnings(wanted)
        else:
            yield from read_prompts(Path(recipe.prompts))[: recipe.num_answers]

    def _beginnings(self, count: int) -> Iterator[list[int]]:
        """Yield beginnings of windows of text and code in turn, of random lengths."""
        paths = {"text": self._recipe.text, "code": self._recipe.code}
        kinds = [self._windows_of(kind, some) for kind, some in paths.items() if some]
        random = np.random.default_rng(self._recipe.seed)
        for index in range(count):
            windows = kinds[index % len(kinds)]
            length = min(int(random.integers(*PROMPT_TOKENS)), self.window // 2)
            yield windows[-1 - index // len(kinds) % len(windows)][:length].tolist()


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: JSON lines with `prompt` where it is a .jsonl, else one a line.

    Raises:
        ConfigError: It cannot be read, or holds none.
    """
    try:
        if path.suffix == ".jsonl":
            return [prompt.text for prompt in read_json_prompts(path)]
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts `{path}` cannot be read: {error}", "give a UTF-8 file, `text` or `self`") from error
    if not prompts:
        raise ConfigError(f"prompts `{path}` holds no prompt", "write one prompt per line")
    return prompts
