"""`edge-run plan`: how large a model for how much text, by the rule of One Epoch Is All You Need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli import console
from edge_runtime.cli.parsing import parse_number

if TYPE_CHECKING:
    from edge_export.one_epoch import Budget

FIT = "Losses are what Chinchilla's fit to web text predicts: read differences, not values."


def plan(
    params: Annotated[str | None, typer.Option(metavar="P", help="Number of parameters, such as 50M.")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="T", help="Number of training tokens, each seen once, such as 1.5B.")
    ] = None,
    flops: Annotated[
        str | None, typer.Option(metavar="F", help="Training cost in FLOPs, 6 x parameters x tokens, such as 1e15.")
    ] = None,
    ratio: Annotated[
        float,
        typer.Option(
            min=1e-3,
            max=1e6,
            metavar="R",
            help="Training tokens per parameter. The paper uses 5; later fits give 8 to 20 for budgets of 1e13 to 1e17 "
            "FLOPs (Chinchilla), or 26 to 34 (Besiroglu).",
        ),
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Plan how large a model and its training text should be. Each token is read once. Give one of --params, --tokens
    and --flops to compute the others; give two to move them to the ratio at the same cost."""
    from edge_export.one_epoch import adjust, complete

    words = {"parameters": ("--params", params), "tokens": ("--tokens", tokens), "flops": ("--flops", flops)}
    given = {name: parse_number(flag, word) for name, (flag, word) in words.items() if word is not None}
    budget = complete(**given, ratio=ratio)
    is_start = len(given) > 1
    report = _report(budget if is_start else None, adjust(budget, ratio) if is_start else budget, ratio)
    if as_json:
        console.write_json(report)
    else:
        _print_report(report)


def _report(start: Budget | None, planned: Budget, ratio: float) -> dict[str, Any]:
    from edge_export.one_epoch import predicted_speedup

    return {
        "ratio": ratio,
        "start": start and _facts(start),
        "plan": _facts(planned),
        "width_factor": start and (start.ratio / ratio) ** 0.25,
        "predicted_speedup": start and predicted_speedup(start, ratio),
    }


def _facts(budget: Budget) -> dict[str, float]:
    return {
        "parameters": budget.parameters,
        "tokens": budget.tokens,
        "tokens_per_parameter": budget.ratio,
        "flops": budget.flops,
        "predicted_loss": budget.loss,
    }


def _print_report(report: dict[str, Any]) -> None:
    columns = [report["plan"]] if report["start"] is None else [report["start"], report["plan"]]
    rows = [("", ["start", "plan"][-len(columns) :])]
    for label, name, show in (
        ("parameters", "parameters", _short),
        ("tokens, each seen once", "tokens", _short),
        ("tokens for each parameter", "tokens_per_parameter", "{:.3g}".format),
        ("training cost in FLOPs", "flops", "{:.2e}".format),
        ("predicted loss, nats a token", "predicted_loss", "{:.3f}".format),
    ):
        rows.append((label, [show(column[name]) for column in columns]))
    for label, cells in rows:
        print(f"{label:28}" + "".join(f"{cell:>12}" for cell in cells))
    print()
    if report["start"] is not None:
        print(f"At the same depth, make it {report['width_factor']:.2f} times as wide.")
        print(_prediction(report["predicted_speedup"]))
    print(FIT)


def _prediction(speedup: float) -> str:
    if not speedup:
        return "A model of the plan's size is predicted never to reach the start's loss: keep the start."
    advice = "" if speedup >= 1 else ": keep the start"
    return f"It should reach the start's loss {speedup:.2f} times as fast (the paper measured 1 to 2.7){advice}."


def _short(number: float) -> str:
    """Return three digits and a unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
