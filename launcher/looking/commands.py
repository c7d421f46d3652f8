"""What can be typed to look at runs: runs, compare, watch and report."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ghostmask.engine.errors import InputError, bad_value
from ghostmask.engine.waiting import waiting_for
from ghostmask.launcher import locate
from ghostmask.launcher.arguments import RUN_HELP, refuse_ranks, typed_path

Parser = argparse.ArgumentParser
PICTURES = (".svg", ".png")


def _describe_runs(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help=f"{RUN_HELP}, or a folder of runs (default: runs/)")
    parser.add_argument("--json", action="store_true", help="print JSON objects instead of a table")
    parser.set_defaults(handler=_runs)


def _describe_compare(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=f"{RUN_HELP}, or the folder of several")
    parser.add_argument(
        "--out", metavar="FILE", type=typed_path("--out"), default=Path("compare.svg"),
        help="the picture of their curves, .svg or .png (default: compare.svg)",
    )  # fmt: skip
    parser.set_defaults(handler=_compare)


def _describe_watch(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.set_defaults(handler=_watch)


def _describe_report(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--out", metavar="FILE", type=typed_path("--out"), help="the .html to write (default: RUN/report/report.html)"
    )
    parser.set_defaults(handler=_report)


LOOKING_COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "runs": ("print all runs: state, step, accuracy, density, age", _describe_runs),
    "compare": ("print where runs differ and what they reached, and draw their curves", _describe_compare),
    "watch": ("show a run as it goes, from its files, until it ends", _describe_watch),
    "report": ("write one HTML file that shows a run: results, curves, layers, warnings", _describe_report),
}
"""Command -> what it does in one line, and the function that adds its arguments."""


def _runs(arguments: Namespace) -> int:
    refuse_ranks("runs")
    from ghostmask.launcher.looking.runs import runs

    with waiting_for("reading the runs"):
        return runs(arguments.runs, as_json=arguments.json)


def _compare(arguments: Namespace) -> int:
    refuse_ranks("compare")
    if arguments.out.suffix not in PICTURES:
        raise bad_value("--out", str(arguments.out), f"give a file that ends in {' or '.join(PICTURES)}")
    locate.output_file("--out", arguments.out, new_folder=True)
    from ghostmask.launcher.cluster.status import known_runs
    from ghostmask.launcher.looking.compare import compare

    with waiting_for("looking for the runs"):
        folders = known_runs(arguments.runs)
    if len(folders) < 2:
        raise InputError(f"RUN = {arguments.runs[0]!r}: give at least two runs, or a folder of several")
    with waiting_for(f"comparing {len(folders)} runs"):
        return compare(folders, arguments.out)


def _watch(arguments: Namespace) -> int:
    refuse_ranks("watch")
    from ghostmask.launcher.looking.watch import watch

    return watch(_one(arguments.run), once=arguments.once)


def _report(arguments: Namespace) -> int:
    refuse_ranks("report")
    run = _one(arguments.run)
    out = arguments.out or run / "report" / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise bad_value("--out", str(out), "give a file that ends in .html")
    locate.output_file("--out", out, new_folder=True)
    from ghostmask.launcher.looking.report import report

    with waiting_for(f"drawing the report of {run}"):
        return report(run, out)


def _one(run: str) -> Path:
    """The folder of one run, which may have no config.yaml (any more). Raises InputError."""
    from ghostmask.launcher.cluster.status import known_runs

    with waiting_for(f"looking for the run {run}"):
        folder, *others = known_runs([run])
    if others:
        raise InputError(f"RUN = {run!r}: holds {len(others) + 1} runs; give one of them, such as {folder}")
    return folder
