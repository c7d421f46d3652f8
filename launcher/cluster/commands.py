"""What can be typed about jobs: the options of submit, status, cancel, logs and table."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from ghostmask.engine.errors import InputError
from ghostmask.engine.waiting import waiting_for
from ghostmask.launcher import settings
from ghostmask.launcher.arguments import RUN_HELP, add_settings, check_networks, count, refuse_ranks, typed_path
from ghostmask.launcher.cluster.options import CLUSTERS, HERE, ClusterOptions, read_options, typed
from ghostmask.launcher.grid import combinations, run_name
from ghostmask.launcher.locate import output_file
from ghostmask.launcher.source import find_source
from ghostmask.launcher.values import as_text

Parser = argparse.ArgumentParser


def _describe_submit(parser: Parser) -> None:
    add_settings(parser)
    several = "runs with every combination of these values, as one job array: mask.density=0.1,0.05 seed=0,1,2"
    chained = "N jobs, one after the other, where none may queue itself again"
    parser.add_argument("--sweep", metavar="KEY=A,B,...", nargs="+", default=[], help=several)
    parser.add_argument("--parallel", metavar="N", type=count, default=0, help="of a sweep's jobs at a time (all)")
    parser.add_argument("--chain", metavar="N", type=count, default=1, help=chained)
    parser.add_argument("--cluster", choices=CLUSTERS, default="slurm", help="slurm, this machine, or this process")
    parser.add_argument("--dry-run", action="store_true", help="print the script and the configuration only")
    parser.add_argument("--from", dest="source", metavar="RUN[@STEP]", help="as of ghostmask train")
    parser.add_argument("--new-data", action="store_true", help="as of ghostmask train")
    hints, docs = get_type_hints(ClusterOptions), settings.field_docs(ClusterOptions)
    for option in fields(ClusterOptions):
        flag, kind = f"--{option.name.replace('_', '-')}", hints[option.name]
        listed: dict[str, Any] = {} if kind in (int, str) else {"action": "append"}
        shown = f"{docs[option.name]} ({as_text(option.default)})"
        parser.add_argument(flag, metavar=option.name.upper(), help=shown.replace("%", "%%"), **listed)
    parser.set_defaults(handler=_submit)


def _describe_status(parser: Parser) -> None:
    which = f"{RUN_HELP}, or a sweep's folder (default: all in runs/)"
    parser.add_argument("runs", metavar="RUN", nargs="*", help=which)
    parser.add_argument("--json", action="store_true", help="print JSON objects instead of a table")
    parser.set_defaults(handler=_status)


def _describe_cancel(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    parser.set_defaults(handler=_cancel)


def _describe_logs(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--rank", metavar="R", type=_rank, default=0, help="which rank (default: 0)")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    parser.set_defaults(handler=_logs)


def _describe_table(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=f"{RUN_HELP}, or the folder of several")
    parser.add_argument("--csv", metavar="FILE", type=typed_path("--csv"), help="also write the table to FILE")
    parser.set_defaults(handler=_table)


CLUSTER_COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "submit": ("train on a cluster: hand one run or a sweep to Slurm", _describe_submit),
    "status": ("print how runs stand: queued, running, failed and why, time left", _describe_status),
    "cancel": ("end the jobs of runs for good; what was saved stays", _describe_cancel),
    "logs": ("print what a rank of a run's job has printed", _describe_logs),
    "table": ("print mean and spread of runs that differ by their seeds", _describe_table),
}
"""Command -> a line on it, and what gives its parser the arguments and the function to call."""


def _submit(arguments: Namespace) -> int:
    refuse_ranks("submit")
    given = typed(vars(arguments))
    for name in (
        () if arguments.cluster == "slurm" else [n for n, v in given.items() if v is not None and n not in HERE]
    ):
        flag = f"--{name.replace('_', '-')}"
        raise InputError(f"{flag}: is not read with --cluster {arguments.cluster}; leave it out")
    options = read_options(given)
    configs = [settings.load_config(arguments.config, arguments.overrides)]
    if arguments.sweep:
        group = settings.run_folder(configs[0])
        fixed = [text for text in arguments.overrides if text.partition("=")[0] != "run"]
        configs = [
            settings.load_config(arguments.config, [*fixed, *chosen, f"run={group / run_name(chosen)}"])
            for chosen in combinations("--sweep", arguments.sweep)
        ]
    flags: Sequence[str] = ["--from", str(find_source(arguments.source))] if arguments.source else []
    flags = [*flags, "--new-data"] if arguments.new_data else flags
    for config in configs:
        check_networks(config)
    from ghostmask.launcher.cluster.submit import submit

    return submit(
        configs, options, cluster=arguments.cluster, flags=flags, chain=arguments.chain, parallel=arguments.parallel,
        dry_run=arguments.dry_run, command=sys.argv[1:],
    )  # fmt: skip


def _status(arguments: Namespace) -> int:
    from ghostmask.launcher.cluster.status import status

    with waiting_for("reading the runs"):
        return status(arguments.runs, as_json=arguments.json)


def _cancel(arguments: Namespace) -> int:
    from ghostmask.launcher.cluster.status import cancel

    return cancel(arguments.runs)


def _logs(arguments: Namespace) -> int:
    from ghostmask.launcher.cluster.status import logs

    return logs(arguments.run, rank=arguments.rank, follow=arguments.follow)


def _table(arguments: Namespace) -> int:
    from ghostmask.launcher.cluster.status import known_runs
    from ghostmask.launcher.table import table

    output_file("--csv", arguments.csv)
    with waiting_for("reading the runs"):
        return table(known_runs(arguments.runs), arguments.csv)


def _rank(text: str) -> int:
    return 0 if text == "0" else count(text)
