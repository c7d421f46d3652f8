"""What can be typed: the subcommands of `ghostmask`, their options, and which function each of them calls."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from ghostmask.benchmarks.registry import BENCHMARKS
from ghostmask.engine.config import DEVICES
from ghostmask.engine.errors import InputError, bad_value
from ghostmask.engine.launch import read_launch
from ghostmask.launcher import locate, settings, show
from ghostmask.launcher.checks import check_config, check_finder
from ghostmask.launcher.cluster.options import CLUSTERS, ClusterOptions, read_options, typed
from ghostmask.launcher.environment import prepare_environment
from ghostmask.launcher.examples import EXAMPLES
from ghostmask.launcher.folder import read_run, resumed
from ghostmask.launcher.grid import combinations, run_name
from ghostmask.launcher.process import open_standard_streams, require_working_directory
from ghostmask.launcher.source import find_source
from ghostmask.launcher.values import as_text

CONFIG_HELP = "YAML file, or the name of a shipped config (ghostmask show configs)"
SETTINGS_HELP = "settings that go before the file's, such as mask.density=0.05 optim.milestones=[90,135]"
OUT_HELP = "the file to write (default: mask.safetensors in the run folder)"
RUN_HELP = "a run's name (folder runs/NAME) or its folder"


def run_command(argv: Sequence[str]) -> int:
    """Parse the arguments, run the command they name, return its exit code.

    Raises InputError for wrong arguments and settings before torch is imported.
    """
    open_standard_streams()
    require_working_directory()
    parser = build_parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
    except SystemExit as done:  # --help and --version have printed
        return int(done.code or 0)
    # argparse leaves out what follows an option: train CONFIG --restart mask.density=0.02
    if rest and ("overrides" not in arguments or any(item.startswith("-") for item in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    handler: Callable[[Namespace], int] = arguments.handler
    if getattr(arguments, "ranks", 1) > 1:
        return _start_ranks(arguments.ranks, argv)
    return handler(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    summary = "Trains sparse networks: a given density, the best accuracy at it, runs that can be killed at any step."
    parser = _Parser(prog="ghostmask", description=summary, epilog=EXAMPLES[""])
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of ghostmask and what it runs on"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    train = _add(commands, "train", "train a run, or go on with it where it stopped", _train)
    _add_settings(train)
    train.add_argument(
        "--restart", action="store_true", help="start over, even where the run folder holds a checkpoint"
    )
    train.add_argument(
        "--from", dest="source", metavar="RUN[@STEP]", help="start a new run from a checkpoint of another one"
    )
    train.add_argument(
        "--new-data", action="store_true", help="go on although the data are others than the run was trained on"
    )
    _add_ranks(train)
    evaluate = _add(commands, "evaluate", "print the accuracy and density of a run's network", _evaluate)
    evaluate.add_argument("run", metavar="RUN", help=RUN_HELP)
    _add_ranks(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    export = _add(commands, "export", "write a run's network as a plain state dict", _export)
    export.add_argument("run", metavar="RUN", help=RUN_HELP)
    export.add_argument("--out", metavar="FOLDER", type=_path("--out"), help="where to write it (default: RUN/export)")
    hessian = _add(commands, "hessian", "print the Hessian's largest eigenvalues at a run's checkpoints", _hessian)
    hessian.add_argument("run", metavar="RUN", help=RUN_HELP)
    hessian.add_argument(
        "--out", metavar="FOLDER", type=_path("--out"), help="where to write it (default: RUN/hessian)"
    )
    hessian.add_argument("--top", metavar="K", type=_count, default=5, help="how many eigenvalues (default: 5)")
    hessian.add_argument(
        "--batches", metavar="N", type=_count, default=4, help="training batches the loss is taken on (default: 4)"
    )
    find = _add(commands, "find-mask", "find a mask before training and write it to a file", _find_mask)
    _add_settings(find)
    find.add_argument(
        "--out",
        metavar="FILE",
        type=_path("--out"),
        help=OUT_HELP,
    )
    _add_ranks(find)
    prepare = _add(commands, "prepare", "download a config's dataset and write its .beton files", _prepare)
    _add_settings(prepare)
    _add_submit(_add(commands, "submit", "train on a cluster: hand one run or a sweep to Slurm", _submit))
    status = _add(commands, "status", "print how runs stand: queued, running, failed and why, time left", _status)
    status.add_argument(
        "runs", metavar="RUN", nargs="*", help=f"{RUN_HELP}, or a sweep's folder (default: all in runs/)"
    )
    status.add_argument("--json", action="store_true", help="print JSON objects instead of a table")
    cancel = _add(commands, "cancel", "end the jobs of runs for good; what was saved stays", _cancel)
    cancel.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    logs = _add(commands, "logs", "print what a rank of a run's job has printed", _logs)
    logs.add_argument("run", metavar="RUN", help=RUN_HELP)
    logs.add_argument("--rank", metavar="R", type=_number, default=0, help="which rank (default: 0)")
    logs.add_argument("--follow", action="store_true", help="go on until the run ends")
    table = _add(commands, "table", "print mean and spread of runs that differ by their seeds", _table)
    table.add_argument("runs", metavar="RUN", nargs="+", help=f"{RUN_HELP}, or the folder of several")
    table.add_argument("--csv", metavar="FILE", type=_path("--csv"), help="also write the table to FILE")
    _add_bench(_add(commands, "bench", "time one part of the system against textbook code", _bench))
    _add_sweep(_add(commands, "sweep", "train several settings over several seeds and print a table", _sweep))
    _add_tost_table(_add(commands, "tost-table", "train masks without and with ToST and print a table", _tost_table))
    _add_topics(_add(commands, "show", "print settings, or what can be chosen"))
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse, with examples below each help text and InputError in place of an exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """--version: looks the versions up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(show.versions())
        parser.exit()


def _add(commands: Any, name: str, summary: str, handler: Callable[[Namespace], int] | None = None) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EXAMPLES.get(name)
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_settings(parser: _Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=SETTINGS_HELP)


def _add_ranks(parser: _Parser) -> None:
    several = (
        "start N ranks on this machine, one per GPU where there are GPUs (default: 1, or what torchrun or srun set)"
    )
    parser.add_argument("--ranks", metavar="N", type=_count, default=1, help=several)


def _add_submit(parser: _Parser) -> None:
    _add_settings(parser)
    several = "runs with every combination of these values, as one job array: mask.density=0.1,0.05 seed=0,1,2"
    parser.add_argument("--sweep", metavar="KEY=A,B,...", nargs="+", default=[], help=several)
    parser.add_argument("--parallel", metavar="N", type=_count, default=0, help="of a sweep's jobs at a time (all)")
    parser.add_argument(
        "--chain",
        metavar="N",
        type=_count,
        default=1,
        help="N jobs, one after the other, where none may requeue itself",
    )
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


def _add_bench(parser: _Parser) -> None:
    names = list(BENCHMARKS)
    parser.add_argument("benchmark", metavar="BENCHMARK", choices=names, help=f"one of {', '.join(names)}")
    parser.add_argument("--json", metavar="FILE", type=_path("--json"), help="also write the rows to FILE")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as train.device")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs: no numbers to quote")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a row does not meet its bar")


def _add_sweep(parser: _Parser) -> None:
    several = f"{CONFIG_HELP}, one or more; then {SETTINGS_HELP}"
    parser.add_argument("overrides", metavar="CONFIG or key=value", nargs="+", help=several)
    parser.add_argument(
        "--vary", metavar="KEY=A,B,...", action="append", default=[], help="values of one setting; again for another"
    )
    _add_table(parser, "runs/sweep")


def _add_tost_table(parser: _Parser) -> None:
    _add_settings(parser)
    for name, default in (
        ("masks", "random,snip,grasp,synflow,magnitude,lth"), ("densities", "0.1,0.05,0.02"), ("tweaks", "all"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", metavar="A,B,...", default=default, help=f"default: {default}")
    parser.add_argument("--print", action="store_true", help="run nothing, print the table of what is there")
    _add_table(parser, "runs/tost")


def _add_table(parser: _Parser, folder: str) -> None:
    parser.add_argument("--seeds", metavar="N", type=_count, default=3, help="seeds 0, 1, ... (default: 3)")
    parser.add_argument(
        "--folder", type=_path("--folder"), default=Path(folder), help=f"where the runs go (default: {folder})"
    )


def _add_topics(parser: _Parser) -> None:
    topics = parser.add_subparsers(title="topics", metavar="TOPIC", required=True, parser_class=_Parser)
    config = _add(topics, "config", "print every setting of a config (or the defaults) with its meaning", _show_config)
    config.add_argument("overrides", metavar="[CONFIG] [key=value]", nargs="*", help=f"{CONFIG_HELP}; {SETTINGS_HELP}")
    for name, table in show.TABLES.items():
        topic = _add(topics, name, f"print the {name} by name, with a line on each")
        topic.set_defaults(handler=lambda _, table=table: _print("\n".join(table())))


def _start_ranks(count: int, argv: Sequence[str]) -> int:
    _refuse_ranks("--ranks")
    from ghostmask.launcher.local_ranks import start_ranks

    return start_ranks(count, argv)


def _train(arguments: Namespace) -> int:
    config = settings.load_config(arguments.config, arguments.overrides)
    if arguments.restart and arguments.source:
        raise InputError("--restart: starts the run over from its seed, --from from a checkpoint; leave one out")
    source = find_source(arguments.source) if arguments.source else None
    check_config(resumed(config, restart=arguments.restart), read_launch().size)
    locate.check_writable(settings.run_folder(config), "run", config.run)
    prepare_environment(config.train.device)
    _check_network(config.model.name)
    from ghostmask.launcher.train import train

    return train(config, restart=arguments.restart, source=source, new_data=arguments.new_data)


def _evaluate(arguments: Namespace) -> int:
    run = locate.find_run(arguments.run)
    prepare_environment(_device_of(run))
    from ghostmask.launcher.evaluate import evaluate

    return evaluate(run, as_json=arguments.json)


def _export(arguments: Namespace) -> int:
    run = locate.find_run(arguments.run)
    out = _output(arguments.out, run / "export")
    prepare_environment(_device_of(run))
    from ghostmask.launcher.export_run import export_run

    return export_run(run, out)


def _hessian(arguments: Namespace) -> int:
    run = locate.find_run(arguments.run)
    out = _output(arguments.out, run / "hessian")
    prepare_environment(_device_of(run))
    from ghostmask.launcher.hessian import hessian

    return hessian(run, out, top=arguments.top, batches=arguments.batches)


def _find_mask(arguments: Namespace) -> int:
    config = settings.load_config(arguments.config, arguments.overrides)
    check_config(config, read_launch().size)
    check_finder(config)
    out = arguments.out or settings.run_folder(config) / "mask.safetensors"
    if out.suffix != ".safetensors":
        raise bad_value("--out", str(out), "give a file ending in .safetensors")
    locate.check_writable(out.parent, "--out", str(out))
    prepare_environment(config.train.device)
    _check_network(config.model.name)
    from ghostmask.launcher.find_mask import find_mask

    return find_mask(config, out)


def _prepare(arguments: Namespace) -> int:
    _refuse_ranks("prepare")
    config = settings.load_config(arguments.config, arguments.overrides)
    check_config(config, world_size=1)
    prepare_environment(config.train.device)
    from ghostmask.data_pipelines.open import prepare

    return _print("\n".join(f"{split}: {path}" for split, path in prepare(config.data).items()))


def _submit(arguments: Namespace) -> int:
    _refuse_ranks("submit")
    options = read_options(typed(vars(arguments)))
    configs = [settings.load_config(arguments.config, arguments.overrides)]
    if arguments.sweep:
        group = settings.run_folder(configs[0])
        configs = [
            settings.load_config(
                arguments.config, [*_unset(arguments.overrides, "run"), *chosen, f"run={group / run_name(chosen)}"]
            )
            for chosen in combinations("--sweep", arguments.sweep)
        ]
    flags = [*(["--from", str(find_source(arguments.source))] if arguments.source else [])]
    flags += ["--new-data"] if arguments.new_data else []
    _check_network(configs[0].model.name)
    from ghostmask.launcher.cluster.submit import submit

    return submit(
        configs, options, cluster=arguments.cluster, flags=flags, chain=arguments.chain, parallel=arguments.parallel,
        dry_run=arguments.dry_run, command=sys.argv[1:],
    )  # fmt: skip


def _status(arguments: Namespace) -> int:
    from ghostmask.launcher.cluster.status import status

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

    return table(known_runs(arguments.runs), arguments.csv)


def _bench(arguments: Namespace) -> int:
    _refuse_ranks("bench")
    if arguments.strict and arguments.quick:
        raise InputError("--strict: the numbers of --quick mean nothing; leave one of them out")
    prepare_environment(arguments.device)
    from ghostmask.launcher.bench import bench

    return bench(
        arguments.benchmark, device=arguments.device, quick=arguments.quick, file=arguments.json,
        strict=arguments.strict,
    )  # fmt: skip


def _sweep(arguments: Namespace) -> int:
    _refuse_ranks("sweep")
    from ghostmask.launcher.sweep import sweep

    return sweep(arguments.overrides, vary=arguments.vary, seeds=arguments.seeds, folder=arguments.folder)


def _tost_table(arguments: Namespace) -> int:
    _refuse_ranks("tost-table")
    from ghostmask.launcher.tost_table import tost_table

    lists = {name: getattr(arguments, name).split(",") for name in ("masks", "densities", "tweaks")}
    return tost_table(
        arguments.config, arguments.overrides, **lists,
        seeds=arguments.seeds, folder=arguments.folder, only_print=arguments.print,
    )  # fmt: skip


def _show_config(arguments: Namespace) -> int:
    first, *others = arguments.overrides or [""]
    named = first and "=" not in first
    config = settings.load_config(first if named else None, others if named else arguments.overrides)
    if named:
        check_config(config, world_size=1)
    return _print(settings.to_yaml(config))


def _refuse_ranks(command: str) -> None:
    if read_launch().size > 1:
        raise InputError(f"ghostmask {command}: is not for several ranks; run it without torchrun, srun or --ranks")


def _check_network(name: str) -> None:
    """Raise InputError where a function of the user's own is not there: that is said before any rank is waited for."""
    if ":" in name:
        from ghostmask.models.foreign import find_builder

        find_builder(name)


def _count(text: str) -> int:
    """A command-line number of at least 1; at most 10,000, each of which costs a pass or a run."""
    if not text.isdecimal() or len(text) > 5 or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1, at most 10000")
    return int(text)


def _number(text: str) -> int:
    """A command-line number of at least 0."""
    return 0 if text == "0" else _count(text)


def _unset(overrides: Sequence[str], key: str) -> list[str]:
    return [text for text in overrides if text.partition("=")[0] != key]


def _output(asked: Path | None, usual: Path) -> Path:
    """Where a command that reads a run writes what it finds: a run's folder may be read-only."""
    out = asked or usual
    locate.check_writable(out, "--out", str(out))
    return out


def _path(field: str) -> Callable[[str], Path]:
    """How argparse reads a path: ~ is the home folder in it; files are written under names that are a little longer."""
    return lambda text: Path(locate.typed_path(field, text, longest_name=locate.LONGEST_NAME - len(".writing.")))


def _device_of(run: Path) -> str:
    return read_run(run).train.device


def _print(text: str) -> int:
    print(text.rstrip("\n"))
    return 0
