"""What can be typed for searches over whole runs: find-density."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ghostmask.launcher.arguments import add_settings, count, refuse_ranks, share, typed_path


def _describe_find_density(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--target", metavar="DENSITY", type=share, required=True, help="the density asked for")
    parser.add_argument(
        "--tolerance", metavar="T", type=share, default=0.1, help="near enough is within T x DENSITY (default: 0.1)"
    )
    parser.add_argument("--runs", metavar="N", type=count, default=10, help="runs at most (default: 10)")
    parser.add_argument("--over", metavar="KEY", default="", help="setting to search (default: what decides it)")
    # Not `ranks`: this command itself is one process.
    parser.add_argument("--ranks", dest="of_each", metavar="N", type=count, default=1, help="ranks of each run")
    folder = Path("runs/density")
    parser.add_argument(
        "--folder", type=typed_path("--folder"), default=folder, help=f"where the runs go (default: {folder})"
    )
    parser.set_defaults(handler=_find_density)


def _find_density(arguments: Namespace) -> int:
    refuse_ranks("find-density")
    from ghostmask.launcher.find_density import find_density

    return find_density(
        arguments.config, arguments.overrides, target=arguments.target, tolerance=arguments.tolerance,
        runs=arguments.runs, over=arguments.over, ranks=arguments.of_each, folder=arguments.folder,
    )  # fmt: skip


SEARCH_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "find-density": ("search the setting that decides a method's density, by whole runs", _describe_find_density),
}
"""Command -> what it is for, and what describes its arguments."""
