"""What can be typed of ghostmask export: its options, and what becomes of them."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from ghostmask.engine.errors import InputError
from ghostmask.engine.waiting import waiting_for
from ghostmask.launcher import locate
from ghostmask.launcher.arguments import RUN_HELP, refuse_ranks, typed_path
from ghostmask.launcher.environment import prepare_environment
from ghostmask.launcher.exporting.registry import CODINGS, FORMATS, PLAIN, VALUES
from ghostmask.launcher.folder import read_run

Parser = argparse.ArgumentParser


def _describe_export(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=f"{RUN_HELP}; with --format also a folder with an export")
    parser.add_argument(
        "--format", choices=[PLAIN, *FORMATS], default=PLAIN, help=f"default: {PLAIN}; docs/export.md compares them"
    )
    parser.add_argument("--values", choices=VALUES, help="packed only: type of the weights (default: float32)")
    parser.add_argument("--coding", choices=CODINGS, help="packed only: entropy = smaller, slower to read")
    parser.add_argument(
        "--out", metavar="FOLDER", type=typed_path("--out"), help="where to write it (default: RUN/export[/FORMAT])"
    )
    parser.set_defaults(handler=_export)


def _export(arguments: Namespace) -> int:
    if arguments.format != "packed" and (arguments.values or arguments.coding):
        raise InputError(f"--values, --coding: mean something for --format packed only, not for {arguments.format}")
    if arguments.format != PLAIN:
        return _export_format(arguments)
    run = locate.find_run(arguments.run)
    out = locate.output_folder(arguments.out, run / "export")
    prepare_environment(read_run(run).train.device)
    from ghostmask.launcher.export_run import export_run

    return export_run(run, out)


def _export_format(arguments: Namespace) -> int:
    refuse_ranks(f"export --format {arguments.format}")
    run = run_or_export(arguments.run)
    with waiting_for(f"{arguments.format} of {run}"):
        prepare_environment("cpu")
        from ghostmask.launcher.exporting.convert import export_format, exported_folder
        from ghostmask.launcher.exporting.exported import Options

        source = exported_folder(run)
        out = locate.output_folder(arguments.out, source / folder_name(arguments.format))
        options = Options(arguments.values or VALUES[0], arguments.coding or CODINGS[0])
        return export_format(source, out, arguments.format, options)


def run_or_export(text: str) -> Path:
    """A run's folder, or one that an export was written to. Raises InputError where it is neither."""
    path = Path(locate.typed_path("run", text))
    return path if (path / "summary.json").is_file() else locate.find_run(text)


def folder_name(format_name: str) -> str:
    """Of a format, beside the plain export: no colon, which not every file system takes."""
    return format_name.replace(":", "_")


EXPORT_COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "export": ("write a run's network, as a plain state dict or in another format", _describe_export),
}
"""Command -> what it does in one line, and the function that adds its arguments."""
