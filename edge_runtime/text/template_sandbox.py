"""Render a chat template: the names and settings that transformers gives it, in a sandbox with bounded work.

jinja2's sandbox keeps a template from the interpreter's attributes. Here it is also made to pay for its work from a
`Budget`: the generated code does so for each block, comparison and container, and the sandbox's own hooks for calls,
operators, filters and what is written.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import GeneratorType
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.environment import Template
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_runtime.text.template_budget import (
    BLOCK,
    CALL,
    MADE_CHARACTER,
    MADE_ITEM,
    Budget,
    magnitude,
    pay_for_format,
    pay_for_method,
    pay_for_operator,
    pay_for_replace,
    size_of,
)

LONGEST_SOURCE = 1 << 17
"""Characters of a template; the longest that models come with have a quarter of it."""

_SHALLOW_FILTERS = frozenset(
    (
        *("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"),
        *("reject", "rejectattr", "reverse", "safe", "select", "selectattr", "slice"),
    )
)
_DEEP_FILTERS = frozenset(
    (
        *("abs", "capitalize", "center", "dictsort", "e", "escape", "filesizeformat", "float", "forceescape"),
        *("format", "groupby", "indent", "int", "join", "lower", "max", "min", "replace", "round", "sort", "string"),
        *("striptags", "sum", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount"),
    )
)
"""Filters that go through all of their values. Those that are in neither set lay out web pages."""
_DEEP_TESTS = (
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge"),
    *("<", "lt", "lessthan", "<=", "le", "in", "lower", "upper"),
)
_SIZED_FILTERS = frozenset(("batch", "center", "indent", "round", "slice", "truncate"))
"""Filters whose numbers say how much they make."""
_SORTING_FILTERS = frozenset(("dictsort", "groupby", "sort", "unique"))
_COMPARISONS = 20
"""Times that a sorted value is compared."""


class _MeteredCode(CodeGenerator):
    """Generates code that pays where jinja2 offers no other place to intervene."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        body = list(nodes_)
        written = [child for node in body if isinstance(node, nodes.Output) for child in node.nodes]
        length = sum(len(text.data) for text in written if isinstance(text, nodes.TemplateData))
        self.writeline(f"environment.budget.spend({BLOCK + MADE_CHARACTER * length})")
        super().blockvisit(body, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        if node.test:
            node.test = nodes.And(nodes.EnvironmentAttribute(f"budget.spend({BLOCK})"), node.test)
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(environment.budget.read(")
        self.visit(node.expr, frame)
        self.write(")")
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:  # noqa: N802
        self.write(f" {operators[node.op]} environment.budget.read(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.join_texts(")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        is_slice = isinstance(node.arg, nodes.Slice)
        self.write("environment.budget.made(" if is_slice else "(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.budget.made(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        is_value = node.ctx == "load"
        self.write("environment.budget.made(" if is_value else "")
        super().visit_Tuple(node, frame)
        self.write(")" if is_value else "")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.budget.made(")
        super().visit_Dict(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is plain text."""

    tags = {"generation"}  # noqa: RUF012 - the base class wants a set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders templates, one at a time.

    Attributes:
        budget: What is left of the template's budget.
    """

    code_generator_class = _MeteredCode
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # the optimizer computes what is constant, before anything could be paid for
            finalize=self._written,
            extensions=[loopcontrols, _GenerationTag],
        )
        self.budget = Budget(0)
        known: dict[str, Any] = {**self.filters}
        self.filters = {name: self._paid_filter(name, known[name]) for name in _SHALLOW_FILTERS | _DEEP_FILTERS}
        self.filters["tojson"] = self._tojson
        tests: dict[str, Any] = {**self.tests}
        self.tests |= {name: self._paid_filter(name, tests[name]) for name in _DEEP_TESTS}
        del self.globals["lipsum"]  # random text of any length
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = self._strftime_now

    def compile_template(self, source: str) -> Template:
        """Compile a template.

        Raises:
            TemplateError: It is too long, or not a template.
        """
        if len(source) > LONGEST_SOURCE:
            raise TemplateError(f"it has {len(source)} characters, expected at most {LONGEST_SOURCE}")
        return self.from_string(source)

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Return the text that a template makes of its variables; what it raises may be any exception."""
        self.budget = Budget(size_of(variables, 1 << 62))
        return template.render(variables)

    def join_texts(self, *parts: Any) -> Any:
        """Compute `a ~ b`."""
        return self.budget.made("".join(str(self.budget.read(part, MADE_CHARACTER)) for part in parts))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method."""
        self.budget.spend(CALL)
        if not isinstance(function, (Macro, type)):
            args = _listed(args)
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps `str.format`
            owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
            pay_for_method(self.budget, owner, name, args, kwargs)
        return self.budget.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        pay_for_operator(self.budget, operator, left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    @pass_context  # so that jinja2 takes nothing for constant and computes it while it compiles
    def _written(self, context: Context, value: Any) -> Any:
        return self.budget.read(value, MADE_CHARACTER)

    def _paid_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter or test that pays for what it reads and makes."""
        is_deep, is_sized = name not in _SHALLOW_FILTERS, name in _SIZED_FILTERS
        units = MADE_CHARACTER * (_COMPARISONS if name in _SORTING_FILTERS else 1)
        pay, signature = _FILTER_COSTS.get(name), inspect.signature(function)

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend(CALL)
            if is_deep:
                args = _listed(args)
                self.budget.read((args, kwargs), units)
            if is_sized:
                self.budget.spend(MADE_ITEM * magnitude((args[1:], kwargs)))
            if pay:
                pay(self.budget, signature.bind(*args, **kwargs).arguments)
            return self.budget.made(function(*args, **kwargs))

        return paid

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Return a value as JSON, by transformers' rules: jinja2's own would escape what HTML must."""
        self.budget.read(value, MADE_CHARACTER)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None and separators is None:
            return encoder.encode(value)
        pieces = []
        for piece in encoder.iterencode(value):
            self.budget.spend(MADE_CHARACTER * len(piece))
            pieces.append(piece)
        return "".join(pieces)

    def _strftime_now(self, layout: str) -> str:
        self.budget.read(layout, 256)  # the longest that the C library may make of one character
        return datetime.now().strftime(layout)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments that can be read before they are used."""
    return tuple(list(value) if isinstance(value, GeneratorType) else value for value in args)


def _pay_for_join(budget: Budget, given: dict[str, Any]) -> None:
    count = len(given["value"]) if hasattr(given["value"], "__len__") else 0
    budget.spend(MADE_CHARACTER * count * len(str(given.get("d", ""))))


def _pay_for_indent(budget: Budget, given: dict[str, Any]) -> None:
    width = given.get("width", 4)
    num_lines = len(str(given["s"]).splitlines()) + 1
    budget.spend(MADE_CHARACTER * num_lines * (len(width) if isinstance(width, str) else abs(width)))


def _pay_for_sum(budget: Budget, given: dict[str, Any]) -> None:
    if not isinstance(given.get("start", 0), (int, float)):  # lists are copied for each one that is added
        budget.read(given["iterable"], len(given["iterable"]))


_FILTER_COSTS: dict[str, Callable[[Budget, dict[str, Any]], None]] = {
    "format": lambda budget, given: pay_for_format(
        budget, str(given["value"]), "%", (given.get("args", ()), given.get("kwargs", {}))
    ),
    "indent": _pay_for_indent,
    "join": _pay_for_join,
    "replace": lambda budget, given: pay_for_replace(budget, str(given["s"]), given["old"], given["new"]),
    "sum": _pay_for_sum,
}
"""What these cost beyond reading their values and keeping their result."""
