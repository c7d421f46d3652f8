"""What can be typed for tables of many runs: sweep, tost-table and methods-table."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ghostmask.engine.config import DEVICES
from ghostmask.launcher.arguments import CONFIG_HELP, SETTINGS_HELP, add_settings, count, refuse_ranks, typed_path
from ghostmask.launcher.locate import output_file

Parser = argparse.ArgumentParser


def _describe_sweep(parser: Parser) -> None:
    several = f"{CONFIG_HELP}, one or more; then {SETTINGS_HELP}"
    parser.add_argument("overrides", metavar="CONFIG or key=value", nargs="+", help=several)
    parser.add_argument(
        "--vary", metavar="KEY=A,B,...", action="append", default=[], help="values of one setting; again for another"
    )
    _add_csv(parser)
    _add_table(parser, "runs/sweep")
    parser.set_defaults(handler=_sweep)


def _describe_tost_table(parser: Parser) -> None:
    add_settings(parser)
    _add_lists(parser, masks="random,snip,grasp,synflow,magnitude,lth", densities="0.1,0.05,0.02", tweaks="all")
    parser.add_argument("--print", action="store_true", help="run nothing, print the table of what is there")
    _add_table(parser, "runs/tost")
    parser.set_defaults(handler=_tost_table)


def _describe_methods_table(parser: Parser) -> None:
    add_settings(parser)
    _add_lists(parser, densities="0.1,0.05,0.02,0.01")
    parser.add_argument("--methods", metavar="A,B,...", help="default: dense, and all that are told their density")
    parser.add_argument(
        "--with", dest="own", metavar="METHOD[@DENSITY]:key=value", action="append", default=[],
        help="a setting of one method's runs, or of one cell's; again for another",
    )  # fmt: skip
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as train.device")
    _add_csv(parser)
    parser.add_argument("--print", action="store_true", help="run nothing, print the table of what is there")
    _add_table(parser, "runs/methods")
    parser.set_defaults(handler=_methods_table)


def _add_lists(parser: Parser, **lists: str) -> None:
    for name, default in lists.items():
        parser.add_argument(f"--{name}", metavar="A,B,...", default=default, help=f"default: {default}")


def _add_csv(parser: Parser) -> None:
    parser.add_argument("--csv", metavar="FILE", type=typed_path("--csv"), help="also write the table to FILE")


def _add_table(parser: Parser, folder: str) -> None:
    parser.add_argument("--seeds", metavar="N", type=count, default=3, help="seeds 0, 1, ... (default: 3)")
    parser.add_argument(
        "--folder", type=typed_path("--folder"), default=Path(folder), help=f"where the runs go (default: {folder})"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=count, default=1,
        help="runs at a time; of several each has one thread, and what it says goes to NAME.log (default: 1)",
    )  # fmt: skip


TABLE_COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "sweep": ("train several settings over several seeds and print a table", _describe_sweep),
    "tost-table": ("train masks without and with ToST and print a table", _describe_tost_table),
    "methods-table": ("train every mask method at several densities and print a table", _describe_methods_table),
}
"""Command -> what it does in one line, and the function that adds its arguments."""


def _sweep(arguments: Namespace) -> int:
    refuse_ranks("sweep")
    output_file("--csv", arguments.csv)
    from ghostmask.launcher.sweep import sweep

    return sweep(
        arguments.overrides, vary=arguments.vary, seeds=arguments.seeds, folder=arguments.folder, jobs=arguments.jobs,
        file=arguments.csv,
    )  # fmt: skip


def _tost_table(arguments: Namespace) -> int:
    refuse_ranks("tost-table")
    from ghostmask.launcher.tost_table import tost_table

    lists = {name: getattr(arguments, name).split(",") for name in ("masks", "densities", "tweaks")}
    return tost_table(
        arguments.config, arguments.overrides, **lists,
        seeds=arguments.seeds, folder=arguments.folder, jobs=arguments.jobs, only_print=arguments.print,
    )  # fmt: skip


def _methods_table(arguments: Namespace) -> int:
    refuse_ranks("methods-table")
    output_file("--csv", arguments.csv)
    from ghostmask.launcher.methods_table import methods_table

    return methods_table(
        arguments.config, [*arguments.overrides, f"train.device={arguments.device}"], own=arguments.own,
        methods=arguments.methods.split(",") if arguments.methods else None, densities=arguments.densities.split(","),
        seeds=arguments.seeds, folder=arguments.folder, jobs=arguments.jobs, only_print=arguments.print,
        file=arguments.csv,
    )  # fmt: skip
