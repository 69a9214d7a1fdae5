"""Every option of `edge-run train draft` and its default; a test holds the command line's defaults equal to these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_export.fastdraft.losses import needs_teacher
from edge_runtime.errors import ConfigError

STAGES = ("pretrain", "continue", "align")
OWN_PROMPTS = "self"
TEXT_PROMPTS = "text"
CODE_SHARE = 2 / 3
"""Share of code in the windows of the continue stage: FastDraft took 5 billion tokens of code and 2.5 of text."""


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """How a draft is made.

    Attributes:
        target: Hugging Face folder or hub id, or a model folder; with the last, the answers come from exactly it.
        text: Files and folders of text for the stage pretrain, and for a third of the stage continue.
        code: Files and folders of code for the rest of the stage continue; empty leaves the stage out.
        size: Parameters, embeddings included; None chooses by a latency budget (`auto_shape.auto_shape`).
        num_layers: Number of layers; None chooses it with the size.
        latency_share: Largest draft time per token, as a fraction of the target's, with the size left to choose.
        stages: Which of STAGES to run; those that were run before are their starting point.
        start: A draft to start from instead of random weights.
        prompts: What the target answers: `text` for beginnings of the texts above, `self` for prompts of its own, or a
            file: JSON lines with `prompt`, or plain text with one prompt a line.
        chat: Put prompts into the target's chat template; None does so where it has one and they are not texts.
        loss: What the stage align minimises, one of `losses.LOSSES`.
        top: Number of most likely target tokens kept per position, for every loss but ce.
        num_answers: Answers to write; None for one for each prompt of a file, else as many as fill answer_tokens.
        answer_tokens: Approximate number of tokens of all answers together.
        max_new_tokens: Longest answer, in tokens.
        window: Tokens of a training window; None for the target's context, at most 1024.
        max_tokens: Most tokens of each stage of text; None for all there are.
        batch_size: Windows of one update.
        micro_batch_size: Windows computed at once; None for all.
        learning_rate: Peak learning rate of pretrain and continue.
        align_learning_rate: Peak learning rate of align after another stage.
        precision: `auto`, `bf16` or `no` (f32).
        device: OpenVINO device on which the target writes.
        seed: Random seed of the initial weights and the order of the text.
    """

    target: str
    text: tuple[Path, ...] = ()
    code: tuple[Path, ...] = ()
    size: float | None = None
    num_layers: int | None = None
    latency_share: float = 0.1
    stages: tuple[str, ...] = STAGES
    start: Path | None = None
    prompts: str = TEXT_PROMPTS
    chat: bool | None = None
    loss: str = "ce"
    top: int = 16
    num_answers: int | None = None
    answer_tokens: float = 1e6
    max_new_tokens: int = 256
    window: int | None = None
    max_tokens: float | None = None
    batch_size: int = 8
    micro_batch_size: int | None = 2
    learning_rate: float = 4e-3
    align_learning_rate: float = 2e-3
    precision: str = "auto"
    device: str = "CPU"
    seed: int = 0

    def __post_init__(self) -> None:
        needs_teacher(self.loss)
        for stage in self.stages:
            if stage not in STAGES:
                raise ConfigError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}")
        if "pretrain" in self.stages and not self.text:
            raise ConfigError(
                "stage pretrain needs a text, and none is given",
                "add --text FILE, or skip the stage with --stages align",
            )
        if "align" in self.stages and self.prompts == TEXT_PROMPTS and not (self.text or self.code):
            raise ConfigError(
                "prompts is text, but no text is given for the target to continue",
                "add --text FILE, --prompts FILE or --prompts self",
            )
        for name in ("size", "answer_tokens", "max_new_tokens", "window", "max_tokens", "top", "latency_share"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}, expected a positive number")
        if self.precision not in ("auto", "bf16", "no"):
            raise ConfigError(f"precision is {self.precision!r}, expected auto, bf16 or no")

    @property
    def top_kept(self) -> int:
        """Most likely tokens to keep for each token: none where the loss does not look at them."""
        return self.top if needs_teacher(self.loss) else 0
