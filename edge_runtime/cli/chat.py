"""`edge-run chat`: chat with a model in the terminal.

The whole conversation is sent each time; `EdgeLLM` keeps the keys and values of what it has read before.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli import console
from edge_runtime.cli.options import ModelOptions, with_model_options
from edge_runtime.cli.running import load_model, run_stream
from edge_runtime.cli.terminal import without_echo
from edge_runtime.cli.transcript import file_of_chat, path_of, read_transcript, write_transcript
from edge_runtime.demo import is_demo
from edge_runtime.errors import ConfigError, ContextOverflowError, EdgeError, nearest
from edge_runtime.user_folders import cache_folder

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM
    from edge_runtime.model_defaults import Recommended
    from edge_runtime.text.chat_template import Message
    from edge_runtime.text.stream import GenerationResult

BLOCK = '"""'
"""Begins and ends a message of several lines."""

HELP = f"""\
/help         list these commands
/undo         take back the last question and its answer
/reset        forget the conversation, keep the system message
/system TEXT  set the system message, which tells the model how to behave; /system alone removes it
/stats        show speed, accepted drafts and memory of the last answer
/save FILE    write the conversation and its system message as JSON; /save alone writes to the last FILE again
/load FILE    go on with a conversation that /save wrote, in place of this one
/quit         leave, as /exit and Ctrl-D do
{BLOCK}           begins and ends a message of several lines
Ctrl-C        stops an answer and keeps what there is of it"""

DOWNLOAD = "`edge-run pull OpenVINO/Phi-3-mini-4k-instruct-int4-ov`"

MAKE_ROOM = "/undo takes back the last question, /reset starts over"


@with_model_options("logprobs")
def chat(
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="System message, which tells the model how to behave."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="NAME",
            help="Go on with the chat of this name, or begin it; it is saved after each answer, and next time the "
            "model need not read it again.",
        ),
    ] = None,
    *,
    options: ModelOptions,
) -> None:
    """Chat with a model in the terminal; type `/help` there for its commands.

    Answers are sampled as the model's generation_config.json asks; options given here override it, and where it says
    nothing the defaults below hold.
    """
    if is_demo(options.model):
        raise ConfigError("the embedded pair cannot chat", f"name a chat model with -m; {DOWNLOAD} fetches one")
    file = None if resume is None else file_of_chat(resume)
    if file is not None and "prefix_cache_dir" not in options.load:
        options.load["prefix_cache_dir"] = cache_folder() / "prefixes"
    with load_model(options, warm_up=True) as llm:
        _chat(llm, options, system, file)


def _chat(llm: EdgeLLM, options: ModelOptions, system: str | None, file: Path | None) -> None:
    if not llm.tokenizer.has_chat_template:
        raise ConfigError(
            f"the model in `{options.model}` has no chat template", "use `edge-run generate`, or a chat model"
        )
    if sys.stdin.isatty():
        console.note(f"{Path(options.model).name}: /help lists the commands, Ctrl-D leaves")
        _edit_lines()
    _note_recommended(llm.recommended, options.generation)
    conversation = Conversation(llm, options, system)
    if file is not None:
        conversation.resume(file, system)
    conversation.run()


class Conversation:
    """The messages so far, and what can be done with them.

    Args:
        llm: A chat model.
        options: Options of every answer; where they are silent, the model's recommended ones count.
        system: The system message.
    """

    def __init__(self, llm: EdgeLLM, options: ModelOptions, system: str | None = None) -> None:
        self._llm, self._system = llm, system
        self._options = {**llm.recommended_options, **options.generation, **options.chat}
        self._messages: list[Message] = []
        self._last: GenerationResult | None = None
        self._file: Path | None = None
        self._saves_itself = False
        self._commands = {
            "/help": lambda _: console.note(HELP),
            "/undo": self._undo,
            "/reset": self._reset,
            "/system": self._set_system,
            "/stats": self._print_stats,
            "/save": self._save,
            "/load": self._load,
        }

    def resume(self, file: Path, system: str | None) -> None:
        """Go on with the chat in a file, which need not exist yet, and save it there after each answer.

        Args:
            file: A transcript.
            system: The system message in place of the file's; None keeps that.
        """
        self._saves_itself = True
        if not file.exists():
            self._file = file
            return
        self._load(str(file))
        self._system = system or self._system

    def run(self) -> None:
        """Read and answer until the user leaves."""
        while True:
            try:
                text = read_message()
                if text.strip() in ("/quit", "/exit"):
                    return
                self._take(text)
            except KeyboardInterrupt:
                console.note("\nCtrl-D or /quit leaves")
            except EOFError:
                _end_prompt_line()
                return
            except EdgeError as error:
                hint = MAKE_ROOM if isinstance(error, ContextOverflowError) else error.hint
                console.print_error(str(error), hint)

    def _take(self, text: str) -> None:
        name, _, argument = text.strip().partition(" ")
        if not re.fullmatch(r"/\w+", name):
            if name:
                self._answer(text)
            return
        if name not in self._commands:
            near = nearest(name, self._commands)
            raise ConfigError(f"unknown command `{name}`", f"did you mean `{near}`?" if near else "try /help")
        self._commands[name](argument.strip())

    def _answer(self, text: str) -> None:
        question: Message = {"role": "user", "content": text}
        with without_echo():
            turns = [*self._transcript(), question]
            result = run_stream(self._llm.stream_chat, turns, console.write, self._options)
        console.write("\n")
        self._last = result
        if result.text:
            self._messages += [question, {"role": "assistant", "content": result.text}]
        else:
            console.note("the model gave no answer, so the question is not kept")
        if self._saves_itself and self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_transcript(self._file, self._transcript())
        self._comment(result)

    def _comment(self, result: GenerationResult) -> None:
        """Say discreetly how fast it was, and why it ended early."""
        metrics, limit = result.metrics, self._llm.context_length
        used = metrics.prompt_tokens + metrics.new_tokens
        if sys.stderr.isatty():
            accepted = f"{metrics.acceptance_rate:.0%} of drafts accepted, " if metrics.proposed_tokens else ""
            console.note(f"{metrics.tokens_per_second:.0f} tokens/s, {accepted}{used} of {limit} tokens of context")
        if result.finish_reason == "length":
            full = f"the context of {limit} tokens is full: {MAKE_ROOM}"
            console.note(
                full
                if used >= limit
                else f"the answer was cut off after {metrics.new_tokens} tokens; `-n` raises the limit"
            )
        if sys.stderr.isatty():
            console.note("")

    def _undo(self, _: str) -> None:
        undone = self._messages[-2:-1]
        del self._messages[-2:]
        console.note(f"taken back: {undone[0]['content']}" if undone else "there is nothing to take back")

    def _reset(self, _: str) -> None:
        self._messages.clear()
        console.note("the conversation is forgotten")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        console.note("the system message is set" if text else "there is no system message now")

    def _print_stats(self, _: str) -> None:
        if self._last:
            console.print_stats(self._last.metrics, self._llm.report())
        else:
            console.note("there is no answer yet")

    def _transcript(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]

    def _save(self, name: str) -> None:
        path = path_of(name) if name else self._file
        if path is None:
            raise ConfigError("/save is given no file name", "for example: /save story.json")
        if path != self._file and path.exists():
            raise ConfigError(
                f"`{path}` exists already", "name a new file; /save replaces only what this chat saved or loaded"
            )
        write_transcript(path, self._transcript())
        self._file = path
        console.note(f"saved as {path}")

    def _load(self, name: str) -> None:
        if not name:
            raise ConfigError("/load is given no file name", "for example: /load story.json")
        path = path_of(name)
        messages = read_transcript(path)
        self._system = str(messages.pop(0)["content"]) if messages and messages[0]["role"] == "system" else None
        self._messages, self._file, self._last = messages, path, None
        console.note(f"loaded {_pairs(len(messages) // 2)} from {path}")


def _edit_lines() -> None:
    """Give `input` editing and a history, and let a paste of several lines be one message."""
    if importlib.util.find_spec("readline"):
        readline: Any = importlib.import_module("readline")
        readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off for its own prompt


def _note_recommended(recommended: Recommended, given: dict[str, Any]) -> None:
    """Say what is taken from the model's generation_config.json, and what cannot be."""
    from edge_runtime.model_defaults import SAMPLING

    for sentence in recommended.ignored:
        console.note(f"note: {sentence}")
    is_greedy = not given.get("temperature", recommended.options.get("temperature"))
    taken = {name: value for name, value in recommended.options.items() if name not in given}
    told = [_told(name, value) for name, value in taken.items() if not (is_greedy and name in SAMPLING)]
    if told:
        what, how = ("", "") if is_greedy else ("sampling ", "; -t 0 for greedy")
        console.note(f"note: {what}from the model's generation_config.json: {', '.join(told)}{how}")


def _pairs(number: int) -> str:
    return "1 question and its answer" if number == 1 else f"{number} questions and answers"


def _told(name: str, value: Any) -> str:
    if name == "logit_bias":
        return "1 token suppressed" if len(value) == 1 else f"{len(value)} tokens suppressed"
    return f"{name.replace('_', '-')} {value:g}"


def read_message() -> str:
    """Read one message, of several lines if it begins with `BLOCK`.

    Raises:
        EOFError: There is no more input.
        ConfigError: The input ended within a message of several lines, which is dropped.
    """
    line = _read_line("> ")
    if not line.startswith(BLOCK):
        return line
    lines = [line.removeprefix(BLOCK)]
    while not lines[-1].rstrip().endswith(BLOCK):
        try:
            lines.append(_read_line("  "))
        except EOFError:
            _end_prompt_line()
            raise ConfigError(
                f"the message is dropped: its closing {BLOCK} is missing",
                f"end a message of several lines with {BLOCK}",
            ) from None
    return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")


def _end_prompt_line() -> None:
    """Let what follows Ctrl-D on a terminal begin on a line of its own."""
    if sys.stdin.isatty():
        console.note("")


def _read_line(prompt: str) -> str:
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
