"""Find the subcommand and run it; every failure is one `error:` line, a `hint:` and an exit code."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.utils import get_params_from_function

from edge_runtime import __version__
from edge_runtime.cli import console
from edge_runtime.cli.options import ADVANCED, COMMON
from edge_runtime.errors import ConfigError, EdgeError, nearest

COMMANDS = (
    "generate",
    "chat",
    "pull",
    "export",
    "train draft",
    "train cats",
    "train hybrid",
    "plan",
    "bench draft",
    "bench cats",
    "bench attention",
    "inspect",
    "devices",
)
"""Each is the function of its name in the module of its name, with `_` for the space."""

FAMILIES = {"train": "Train a model.", "bench": "Measure a technique beside its baselines."}
"""First words of commands of two words, and their help."""

DEBUG = "--debug"
HELP_FLAGS = ["-h", "--help"]
COMPLETION_VARIABLE = "_EDGE_RUN_COMPLETE"
"""Set by the script that a shell sources to complete what is typed."""

# The class of every wrong call. Typer ships click under another name since 0.26, so this is how both have it.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Command(TyperCommand):
    """A subcommand whose help lists its options in groups."""

    help_texts: dict[str, str]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options group by group."""
        for title, parameters in grouped(self.get_params(ctx)).items():
            with formatter.section(title):
                formatter.write_dl([self._help_record(parameter, ctx) for parameter in parameters])

    def _help_record(self, parameter: Any, ctx: Any) -> tuple[str, str]:
        if parameter.param_type_name == "argument":
            return parameter.metavar, self.help_texts[parameter.name]  # typer 0.25 loses it under click 8.5
        record: tuple[str, str] = parameter.get_help_record(ctx)
        return record


class Commands(TyperGroup):
    """The subcommands, imported when asked for: all of them, or those whose first word is `family`."""

    family: str = ""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, without the family's, in the order of the help; first words where a shell completes one."""
        prefix = f"{self.family} " if self.family else ""
        names = [name.removeprefix(prefix) for name in COMMANDS if name.startswith(prefix)]
        return list(dict.fromkeys(name.split()[0] for name in names)) if ctx.resilient_parsing else names

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a subcommand, or return a family."""
        if cmd_name in FAMILIES and not self.family:
            return family_command(cmd_name)
        return load_command(f"{self.family} {cmd_name}".strip()) if cmd_name in self.list_commands(ctx) else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the subcommand that is called; suggest the nearest for an unknown one."""
        names = self.list_commands(ctx)
        first_words = {name.split()[0] for name in names}
        if args[0] not in first_words and not ctx.resilient_parsing:
            near = nearest(args[0], [*names, *first_words])
            called = f"{self.family} ".lstrip()
            hint = f"did you mean `{called}{near}`?" if near else f"commands: {', '.join(names)}"
            if " " in args[0]:
                hint = f'to continue a text: `edge-run generate "{args[0]}"`'
            raise ConfigError(f"unknown command `{called}{args[0]}`", hint)
        return super().resolve_command(ctx, args)


def grouped(parameters: list[Any]) -> dict[str, list[Any]]:
    """Return parameters by heading: arguments, common options, those with a heading of their own, the rare ones."""
    groups: dict[str, list[Any]] = {"Arguments": [], COMMON: []}
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or COMMON
        groups.setdefault(title, []).append(parameter)
    rare = groups.pop(ADVANCED, [])
    return {title: members for title, members in {**groups, ADVANCED: rare}.items() if members}


def load_command(name: str) -> Any:
    """Return a subcommand as typer's command object."""
    module_name = name.replace(" ", "_")
    function = getattr(importlib.import_module(f"edge_runtime.cli.{module_name}"), module_name)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": HELP_FLAGS})
    headline = re.split("[.;]", function.__doc__)[0]
    app.command(name, cls=Command, short_help=headline)(function)
    command: Any = typer.main.get_command(app)
    parameters = get_params_from_function(function)
    helped = {name: parameter.default for name, parameter in parameters.items() if hasattr(parameter.default, "help")}
    command.help_texts = {name: option.help for name, option in helped.items()}
    return command


def root_command() -> Any:
    """Return `edge-run` as typer's command object."""
    return _group(_root, _root.__doc__, has_completion=True)


def family_command(name: str) -> Any:
    """Return the commands whose first word is `name` as typer's command object."""
    group = _group(_print_help, FAMILIES[name])
    group.family = name
    return group


def _group(callback: Callable[..., None], text: str | None, *, has_completion: bool = False) -> Any:
    """Return a group of commands whose help is `text`."""
    app = typer.Typer(
        cls=Commands,
        add_completion=has_completion,
        rich_markup_mode=None,
        invoke_without_command=True,
        context_settings={"help_option_names": HELP_FLAGS},
    )
    app.callback(help=text)(callback)
    return typer.main.get_command(app)


def _print_help(context: typer.Context) -> None:
    """Print the help of a group that was called without a command."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(args: Sequence[str]) -> int:
    """Run `edge-run` with these arguments and return the exit code; KeyboardInterrupt passes through."""
    console.use_utf8()
    end = args.index("--") if "--" in args else len(args)
    is_debug = DEBUG in args[:end]
    try:
        code = _invoke([arg for i, arg in enumerate(args) if arg != DEBUG or i > end])
        sys.stdout.flush()
        return code
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever happened becomes one line
        if is_debug:
            traceback.print_exc()
        return _report(error)


def _invoke(args: list[str]) -> int:
    root = root_command()
    if os.environ.get(COMPLETION_VARIABLE):
        root.main([], "edge-run")  # prints what completes the words that the shell hands over, and exits
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    try:
        with root.make_context("edge-run", args) as context:
            root.invoke(context)
    except typer.Exit as leaving:
        return leaving.exit_code
    return 0


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Print the traceback of an error; may stand anywhere in the command.")
    ] = False,
) -> None:
    """Fast and private language models on this computer."""
    if version:
        print(f"edge-run {__version__}")
    else:
        _print_help(context)


class _Failure(NamedTuple):
    message: str
    hint: str | None
    exit_code: int


def _report(error: Exception) -> int:
    is_stdout_broken = isinstance(error, OSError) and console.abandon_if_broken(sys.stdout)
    if console.is_closed_pipe(error):
        return 0  # whoever reads us has seen enough
    failure = _explain(error, "stdout" if is_stdout_broken else None)
    console.print_error(failure.message, failure.hint)
    return failure.exit_code


def _explain(error: Exception, file: str | None = None) -> _Failure:
    if isinstance(error, EdgeError):
        return _Failure(str(error), error.hint, error.exit_code)
    if isinstance(error, _UsageError):
        return _explain_usage(error)
    if isinstance(error, OSError):
        name = file or error.filename
        return _Failure(f"{f'`{name}`: ' if name else ''}{error.strerror or error}", None, 1)
    if isinstance(error, MemoryError):
        return _Failure("not enough memory", "use a smaller model, or close other programs", 1)
    kind = type(error).__name__
    return _Failure(
        f"internal error: {kind}: {error}",
        f"this is a fault of edge-run: `edge-run {DEBUG} …` prints the traceback for a report",
        1,
    )


def _explain_usage(error: Any) -> _Failure:
    help_hint = f"`{error.ctx.command_path} --help` lists the options" if error.ctx else None
    if hasattr(error, "possibilities"):
        near = _nearest_option(error)
        return _Failure(
            f"unknown option `{error.option_name}`", f"did you mean `{near}`?" if near else help_hint, error.exit_code
        )
    message = " ".join(error.format_message().rstrip(".").split())
    if "extra argument" in message:
        help_hint = "put a text of several words in quotes"
    return _Failure(message[0].lower() + message[1:], help_hint, error.exit_code)


def _nearest_option(error: Any) -> str | None:
    """Return the option that an unknown one begins, or else resembles most."""
    flags = (
        [flag for parameter in error.ctx.command.get_params(error.ctx) for flag in parameter.opts] if error.ctx else []
    )
    return nearest(error.option_name, flags)
