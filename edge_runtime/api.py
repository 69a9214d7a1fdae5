"""`EdgeLLM`: load a model, generate, stream, chat. The one class most users see.

    llm = EdgeLLM.load()  # the embedded pair; or EdgeLLM.load("target", draft="draft")
    result = llm.generate("Once upon a time", max_new_tokens=50)
    with llm.stream("Once upon a time", temperature=0.7, seed=1) as stream:
        for chunk in stream:
            print(chunk.text, end="")
    answer = llm.chat([{"role": "user", "content": "Tell me a story"}])

Options are those of `config.GenerationConfig`, for chats also those of `chat_config.ChatConfig`; an unknown one raises
and suggests the nearest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edge_runtime.arguments import (
    Prompt,
    as_file,
    as_ids,
    as_messages,
    check_count,
    check_path,
    nth_config,
    with_configs,
)
from edge_runtime.background import Background
from edge_runtime.checksums import checked
from edge_runtime.config import GenerationConfig, LoadConfig
from edge_runtime.decoding.drafters.base import Drafter
from edge_runtime.decoding.drafters.draft_model import DraftModel
from edge_runtime.decoding.engine import Engine
from edge_runtime.decoding.request import Request, check_prompt
from edge_runtime.decoding.scheduler import Scheduler
from edge_runtime.demo import or_demo
from edge_runtime.errors import ConfigError, ModelFormatError
from edge_runtime.forks import HomeProcess
from edge_runtime.hub_cache import resolve
from edge_runtime.manifest import Manifest, load_manifest
from edge_runtime.metrics import Metrics
from edge_runtime.model_defaults import Recommended, read_recommended
from edge_runtime.models.base import CausalModel, advance
from edge_runtime.text.chat_config import ChatConfig
from edge_runtime.text.stream import Answer, GenerationResult, TextStream, finish_together

if TYPE_CHECKING:
    from edge_runtime.text.async_stream import AsyncTextStream
    from edge_runtime.text.chat_template import Message
    from edge_runtime.text.tokenizer import Tokenizer


@contextlib.contextmanager
def _unreadable_files_are_named() -> Iterator[None]:
    """Turn what the system says about a file that may not be read, or vanishes meanwhile, into one line."""
    try:
        yield
    except OSError as error:
        raise ModelFormatError(
            f"`{error.filename}` cannot be read: {error.strerror or error}", "check its permissions, or copy it again"
        ) from error


class EdgeLLM:
    """A loaded target, with a draft or without. Requests of any threads are answered at the same time.

    Make one with `EdgeLLM.load`. A `with` statement closes it in the end.

    Attributes:
        tokenizer: The target's.
        manifest: Facts of the target's folder.
        load_s: Seconds that loading took.
        recommended: What generation_config.json recommends.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        manifest: Manifest,
        load_s: float,
        recommended: Recommended | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.manifest, self.load_s = engine, tokenizer, manifest, load_s
        self.recommended = recommended or Recommended({}, [])
        self._home = HomeProcess(engine)
        self._scheduler = Scheduler(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @classmethod
    @_unreadable_files_are_named()
    def load(
        cls, model: str | Path | None = None, draft: str | Path | None = None, device: str = "CPU", **options: Any
    ) -> Self:
        """Load a model folder, and a draft's if given.

        Args:
            model: Folder of the target, from `edge-run export`, `edge-run pull` or optimum-intel; None for the embedded
                one, with its own draft if no other is given.
            draft: Folder of a draft with the same vocabulary; None for none.
            device: OpenVINO device of the target.
            **options: Fields of `config.LoadConfig`, such as draft_device, precision, kv_precision.

        Raises:
            ConfigError: An option is unknown or has a bad value.
            ModelFormatError: A folder is missing or damaged.
            ModelPairError: The vocabularies differ.
            DeviceError: A device is absent or refuses the model.
            ExtensionError: A model has fused MLPs, and the compiled library of ov_kernels is not installed.
        """
        from edge_runtime.models.loading import load_model

        started = time.perf_counter()
        config = LoadConfig.from_options(device=device, **options)
        check_path("model", model)
        check_path("draft", draft)
        model, draft = or_demo(model, draft)
        if draft is None:
            _check_wants_no_draft(config)
        folder, draft = resolve(Path(model)), None if draft is None else resolve(Path(draft))
        manifest = load_manifest(folder)
        draft_manifest = load_manifest(draft) if draft is not None else None
        files = [(folder, manifest.files)]
        if draft is not None and draft_manifest is not None:
            files.append((draft, draft_manifest.files))
        with checked(files):
            # No longer than a small model's compilation. Where loading fails, a daemon would abort the process.
            tokenizer = Background(lambda: _load_tokenizer(folder, draft), daemon=False)
            target = load_model(folder, manifest, config.for_target(has_draft=draft is not None))
            drafter = None
            if draft is not None and draft_manifest is not None:
                drafting = load_model(draft, draft_manifest, config.for_draft())
                _warm_up(drafting)  # its first run comes in the middle of an answer
                drafter = DraftModel(drafting, target.vocab_size)
            read = tokenizer.result()
        from edge_runtime.text.turn_ends import answer_ends

        manifest = dataclasses.replace(manifest, eos_token_ids=answer_ends(folder, manifest, read))
        recommended = read_recommended(folder, target.vocab_size)
        return cls(Engine(target, drafter), read, manifest, time.perf_counter() - started, recommended)

    @property
    def target(self) -> CausalModel:
        """The compiled target, to measure it; nothing else may run while it is used."""
        return self.engine.target

    @property
    def drafter(self) -> Drafter | None:
        """What drafts for the target, apart from prompt lookup."""
        return self.engine.drafter

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.target.context_length

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the target gives logits for."""
        return self.target.vocab_size

    def report(self) -> dict[str, dict[str, Any]]:
        """Return how `target`, and `draft` where there is one, really run: arithmetic and why, caches, threads.

        Raises:
            EdgeError: The model was closed.
        """
        self._scheduler.check_open()
        report = {"target": self.target.report()}
        if isinstance(self.drafter, DraftModel):
            report["draft"] = self.drafter.model.report()
        return report

    def close(self) -> None:
        """Cancel all requests and give the models back; every later request is refused. In a fork nothing is done."""
        if not self._home.is_here or not self._scheduler.close():
            return
        for model in (self.target, *([self.drafter.model] if isinstance(self.drafter, DraftModel) else [])):
            model.close()

    @property
    def recommended_options(self) -> dict[str, Any]:
        """Options of the model's generation_config.json; nothing takes them by itself but `edge-run chat`."""
        return dict(self.recommended.options)

    def warm_up(self) -> None:
        """Prepare the target's weights for its first run, where there is time between loading and the first request."""
        self.generate([0], max_new_tokens=1, num_draft_tokens=0)  # a request, since others may have come first

    def generate(self, prompt: Prompt, config: GenerationConfig | None = None, **options: Any) -> GenerationResult:
        """Continue a prompt.

        Args:
            prompt: Text, or token ids.
            config: Options made once for several requests; None for the defaults.
            **options: Fields of `config.GenerationConfig`, which go before those of `config`.

        Raises:
            ConfigError: An option is unknown or has a bad value, or the prompt is empty.
            ContextOverflowError: The prompt does not fit the context.
        """
        return self.stream(prompt, config, **options).finish()

    async def agenerate(
        self, prompt: Prompt, config: GenerationConfig | None = None, **options: Any
    ) -> GenerationResult:
        """Continue a prompt while other tasks run; takes what `generate` takes."""
        return await self.astream(prompt, config, **options).finish()

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        n: int = 1,
        **options: Any,
    ) -> list[GenerationResult]:
        """Continue several prompts at the same time, which takes much less time than one after another.

        Args:
            prompts: Each text, or token ids.
            config: Options of all requests, or those of each prompt; None for the defaults.
            n: Answers to each prompt. With a seed, the first has this seed, the second the next one, and so on.
            **options: Fields of `config.GenerationConfig`, which go before those of `config`.

        Returns:
            The n answers to the first prompt, then those to the second, and so on.

        Raises:
            ConfigError: As for `generate`; or there are not as many configs as prompts, or n is below 1.
            ContextOverflowError: A prompt does not fit the context.
        """
        streams = [
            self.stream(prompt, nth_config(GenerationConfig.from_options(own, **options), number))
            for prompt, own in with_configs(prompts, config)
            for number in range(check_count("n", n))
        ]
        return finish_together(streams)

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> TextStream:
        """Continue a prompt piece by piece; takes what `generate` takes.

        Args:
            prompt: Text, or token ids.
            config: Options made once for several requests; None for the defaults.
            on_prefill: Called with the prompt's tokens done and wanted while a long prompt is read.
            **options: Fields of `config.GenerationConfig`, which go before those of `config`.

        Returns:
            An iterator of chunks, whose `result` is complete once it is exhausted, closed or cancelled. In a `with`
            statement it is closed however its reader leaves.

        Raises:
            EdgeError: The process is a fork of the one that loaded the model, or the model was closed.
        """
        self._home.check()
        config = GenerationConfig.from_options(config, **options)
        self._check_config(config)
        if on_prefill is not None and not callable(on_prefill):
            raise ConfigError(f"on_prefill is {on_prefill!r:.60}, expected a function of two numbers")
        ids = self._ids(prompt)
        answer = Answer(self.tokenizer.decode_stream(ids), config.stop, on_prefill is not None)
        metrics = Metrics(load_s=self.load_s)
        request = Request(ids, config, self.context_length, answer, self.stop_token_ids(config), metrics)
        return TextStream(request, answer, self._scheduler, self._home, on_prefill)

    def astream(self, prompt: Prompt, config: GenerationConfig | None = None, **options: Any) -> AsyncTextStream:
        """Continue a prompt piece by piece, for `async for`; takes what `stream` takes."""
        from edge_runtime.text.async_stream import AsyncTextStream

        return AsyncTextStream(self.stream(prompt, config, **options))

    def save_prefix(self, path: str | PathLike[str], prompt: Prompt) -> int:
        """Write the keys and values of a prompt to a file, so that another process need not read the prompt again.

        Args:
            path: Written whole or not at all; what it held before is replaced.
            prompt: Text, or token ids; it is read first if it is not held.

        Returns:
            How many tokens the file holds.

        Raises:
            ConfigError: The file cannot be written.
            DeviceError: The model runs on an NPU or a GPU, which give their caches to nobody.
            ContextOverflowError: The prompt does not fit the context.
        """
        file, ids = as_file(path), self._ids(prompt)
        self.generate(ids, max_new_tokens=1, num_draft_tokens=0)  # beside others, which a call would keep waiting
        self._scheduler.call(lambda: self.target.save(file, ids))
        return len(ids)

    def load_prefix(self, path: str | PathLike[str]) -> int:
        """Take the keys and values that `save_prefix` has written for this very model.

        Returns:
            How many tokens are held now; 0, with a warning in the log, where the file is damaged or another model's.

        Raises:
            ConfigError: It is no path of a file.
            DeviceError: The model runs on an NPU or a GPU.
        """
        self._home.check()
        file = as_file(path)
        return self._scheduler.call(lambda: self.target.load(file))

    def chat(
        self, messages: str | Sequence[Message], config: GenerationConfig | None = None, **options: Any
    ) -> GenerationResult:
        """Answer a chat: the messages so far, or one user message. Earlier turns are not computed again.

        Args:
            messages: Dictionaries with role and content, or text.
            config: Options made once for several requests; None for the defaults.
            **options: Fields of `chat_config.ChatConfig`, and of `config.GenerationConfig` as for `generate`.

        Raises:
            ConfigError: The model has no chat template, a message is not one, or one of `generate`'s reasons.
        """
        return self.stream_chat(messages, config, **options).finish()

    def stream_chat(
        self, messages: str | Sequence[Message], config: GenerationConfig | None = None, **options: Any
    ) -> TextStream:
        """Answer a chat piece by piece; takes what `chat` takes."""
        chat, rest = ChatConfig.split(options)
        return self.stream(self.tokenizer.apply_chat_template(as_messages(messages), chat), config, **rest)

    async def achat(
        self, messages: str | Sequence[Message], config: GenerationConfig | None = None, **options: Any
    ) -> GenerationResult:
        """Answer a chat while other tasks run; takes what `chat` takes."""
        return await self.astream_chat(messages, config, **options).finish()

    def astream_chat(
        self, messages: str | Sequence[Message], config: GenerationConfig | None = None, **options: Any
    ) -> AsyncTextStream:
        """Answer a chat piece by piece, for `async for`; takes what `chat` takes."""
        from edge_runtime.text.async_stream import AsyncTextStream

        return AsyncTextStream(self.stream_chat(messages, config, **options))

    def stop_token_ids(self, config: GenerationConfig) -> tuple[int, ...]:
        """Return the ids that end an answer of this request."""
        own = () if config.ignore_eos else self.manifest.eos_token_ids
        return (*own, *config.stop_token_ids)

    def _ids(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens, for which there is room."""
        if isinstance(prompt, str) and not prompt:
            raise ConfigError("the prompt is empty", "give at least one character")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else as_ids(prompt)
        check_prompt(ids, self.context_length, self.manifest.context_length)
        self._check_ids("the prompt", ids)
        return ids

    def _check_config(self, config: GenerationConfig) -> None:
        """Refuse what this model cannot honour."""
        self._check_ids("stop_token_ids", config.stop_token_ids)
        self._check_ids("logit_bias", config.logit_bias)
        if config.num_draft_tokens not in ("auto", 0) and not self.engine.can_draft(config):
            raise ConfigError(
                f"num_draft_tokens is {config.num_draft_tokens}, but no draft model is loaded and `lookup` is off",
                "load a draft, or set `lookup`",
            )

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"{name} holds token id {token_id}, expected an id from 0 to {vocab_size - 1}",
                    "use the model's own tokenizer",
                )


def _load_tokenizer(folder: Path, draft: Path | None) -> Tokenizer:
    """Return the target's tokenizer, once the draft's is known to be the same."""
    from edge_runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    if draft is not None:
        tokenizer.check_same_vocabulary(Tokenizer(draft))
    return tokenizer


def _warm_up(model: CausalModel) -> None:
    """Run one token: plugins pack weights in the first run, which nobody should wait for in an answer."""
    sequence = model.sequence()
    advance(model, sequence, [0])
    sequence.rollback(0)
    sequence.close()


def _check_wants_no_draft(config: LoadConfig) -> None:
    """Refuse options of a draft where there is none, rather than drop them."""
    for name in ("draft_device", "draft_properties"):
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"{name} is {value!r:.60}, but no draft is loaded", f"load a draft, or leave out `{name}`"
            )
