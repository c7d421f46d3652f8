"""What does the command line offer, and does everything wrong end in one line and exit code 2, long before torch?"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostmask.data_pipelines.registry import DATASETS
from ghostmask.engine.errors import EXIT_INTERRUPTED, InputError, RunStopped
from ghostmask.launcher import cli, show
from ghostmask.launcher import main as entry
from ghostmask.launcher.cli import build_parser, run_command
from ghostmask.launcher.locate import shipped_configs
from ghostmask.launcher.settings import load_config
from ghostmask.masks.registry import METHODS
from ghostmask.models.names import OTHERS
from ghostmask.models.registry import MODELS

GHOSTMASK = str(Path(sysconfig.get_path("scripts")) / "ghostmask")

COMMAND_LINE = {
    "ghostmask": ["-h --help", "--version"],
    "ghostmask evaluate": ["RUN", "[data.KEY=VALUE ...]", "-h --help", "--ranks", "--json", "--per-class"],
    "ghostmask export": ["RUN", "-h --help", "--format", "--values", "--coding", "--out"],
    "ghostmask train": ["CONFIG", "[key=value ...]", "-h --help", "--restart", "--from", "--new-data", "--dry-run",
                       "--ranks"],
    "ghostmask hessian": ["RUN", "-h --help", "--out", "--top", "--batches"],
    "ghostmask find-mask": ["CONFIG", "[key=value ...]", "-h --help", "--out", "--ranks"],
    "ghostmask prepare": ["CONFIG", "[key=value ...]", "-h --help"],
    "ghostmask submit": [
        "CONFIG", "[key=value ...]", "-h --help", "--sweep", "--parallel", "--chain", "--cluster", "--dry-run",
        "--from", "--new-data", "--nodes", "--min-nodes", "--gpus-per-node", "--tasks-per-node", "--cpus-per-task",
        "--mem-gb", "--time", "--signal-s", "--partition", "--account", "--qos", "--constraint", "--exclude",
        "--comment", "--interface", "--setup", "--sbatch", "--srun",
    ],
    "ghostmask init": ["FOLDER", "-h --help", "--out"],
    "ghostmask doctor": ["CONFIG", "[key=value ...]", "-h --help", "--ranks"],
    "ghostmask status": ["[RUN ...]", "-h --help", "--json"],
    "ghostmask cancel": ["[RUN ...]", "-h --help"],
    "ghostmask logs": ["RUN", "-h --help", "--rank", "--follow"],
    "ghostmask table": ["[RUN ...]", "-h --help", "--csv"],
    "ghostmask bench": ["BENCHMARK", "RUN", "-h --help", "--json", "--device", "--quick", "--strict"],
    "ghostmask sweep": ["[CONFIG or key=value ...]", "-h --help", "--vary", "--csv", "--seeds", "--folder", "--jobs"],
    "ghostmask runs": ["[RUN ...]", "-h --help", "--json"],
    "ghostmask compare": ["[RUN ...]", "-h --help", "--out"],
    "ghostmask watch": ["RUN", "-h --help", "--once"],
    "ghostmask report": ["RUN", "-h --help", "--out"],
    "ghostmask tost-table": [
        "CONFIG", "[key=value ...]", "-h --help", "--masks", "--densities", "--tweaks", "--print", "--seeds",
        "--folder", "--jobs",
    ],
    "ghostmask methods-table": [
        "CONFIG", "[key=value ...]", "-h --help", "--densities", "--methods", "--with", "--device", "--csv", "--print",
        "--seeds", "--folder", "--jobs",
    ],
    "ghostmask find-density": [
        "CONFIG", "[key=value ...]", "-h --help", "--target", "--tolerance", "--runs", "--over", "--ranks", "--folder",
    ],
    "ghostmask completion": ["SHELL", "-h --help"],
    "ghostmask show": ["-h --help"],
    "ghostmask show config": ["[[CONFIG] [key=value] ...]", "-h --help"],
    "ghostmask show methods": ["NAME", "-h --help"],
    "ghostmask show models": ["-h --help"],
    "ghostmask show datasets": ["-h --help"],
    "ghostmask show configs": ["-h --help"],
}  # fmt: skip
"""The whole command line: to change it is to change what users type and scripts hold."""


def ghostmask(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed console script with the launcher's variables as given, and none otherwise."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [GHOSTMASK, *arguments]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_line_is_the_one_that_is_written_here() -> None:
    assert dict(_parsers(build_parser())) == COMMAND_LINE


@pytest.mark.parametrize("command", COMMAND_LINE)
def test_every_help_text_names_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*command.split()[1:], "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {command} [-h]")
    for argument in COMMAND_LINE[command]:
        assert argument.split()[-1] in text or argument in text
    if command in ("ghostmask", "ghostmask train", "ghostmask evaluate", "ghostmask export", "ghostmask prepare"):
        assert "\nexamples:\n  ghostmask " in text


def test_every_example_of_the_help_texts_is_a_valid_command_line() -> None:
    examples = re.findall(
        r"^  (?:torchrun .*-m ghostmask|ghostmask) (.*?)(?:   .*| > .*)?$", _all_epilogs(), re.MULTILINE
    )
    assert len(examples) > 12
    for example in examples:
        arguments = build_parser().parse_args([word for word in example.split() if word != "--restart"])
        config = getattr(arguments, "config", "my.yaml")
        assert config == "my.yaml" or config in shipped_configs()
        if "overrides" in arguments:
            load_config(
                config if config in shipped_configs() else None, [word for word in arguments.overrides if "=" in word]
            )


WRONG = {
    "train digits_probmask mask.method=probmsk": "mask.method = 'probmsk' is not known: did you mean 'probmask'?",
    "train digits_probmask model.name=resnet-32": "model.name = 'resnet-32' is not known: did you mean 'resnet32' or",
    "train digits_probmask data.dataset=cifar": "data.dataset = 'cifar' is not known: did you mean 'cifar10'?",
    "train cifar10_resnet32_probmask mask.densty=0.1": "mask.densty is not a setting: did you mean mask.density?",
    "train cifar10_resnet32_probmask mask.density=0": "mask.density = 0.0: give a number in (0, 1]",
    "train cifar10_resnet32_probmask mask.density=1.5": "mask.density = 1.5: give a number in (0, 1]",
    "train cifar10_resnet32_probmask mask.density=nan": "mask.density = nan: expected float",
    "train cifar10_resnet32_probmask train.zero_stage=3": "train.zero_stage = 3: stage 3 shards the forward pass",
    "train cifar10_resnet32_probmsk": "config = 'cifar10_resnet32_probmsk' is not known: did you mean",
}
"""Arguments -> how the one line on stderr begins."""

MORE_WRONG = {
    "prepare cifar10_resnet32_probmask seed=x": "seed = x: expected int",
    "show config cifar10_resnet32_probmask mask.path=x": "mask.path = x: is not read with mask.method=probmask",
    "show config digits_tost mask.method=file mask.path=x": (
        "mask.density = 0.05: is not read with mask.method=file; leave it out, or use mask.density=1"
    ),
    "train digits_tost mask.method=file mask.density=1": "mask.path = '': name the file for mask.method=file",
    "train digits_probmask run=/dev/null/x": "run = '/dev/null/x': /dev/null is a file; give another place",
    "find-mask no_such_config": "config = 'no_such_config' is not known",
    "find-mask cifar10_resnet32_snip --out /dev/null/m.safetensors": "--out = '/dev/null/m.safetensors': /dev/null is",
    "find-mask cifar10_resnet32_lth": "mask.method = 'lth': finds its mask by training",
    "evaluate no_such_run": "run = 'no_such_run'",
    "export no/such/run": "run = 'no/such/run'",
    "train digits_probmask model.name=mobilenet-v3": "model.name = 'mobilenet-v3' is not known: did you mean 'mob",
    "train digits_probmask model.name=my.nets.small": (
        "model.name = 'my.nets.small' is not known: did you mean 'my.nets:small'?"
    ),
    "train digits_probmask model.name=no_such:small": "model.name = 'no_such:small': there is no module 'no_such' in /",
    "find-mask cifar10_resnet32_snip model.name=no.such:small": "model.name = 'no.such:small': there is no module 'no'",
    "bench mask --quick --strict": "--strict: the numbers of --quick mean nothing; leave one of them out",
    "sweep mask.density=0.1": "ghostmask sweep: name at least one CONFIG, such as digits_probmask",
    "sweep digits_probmask --vary mask.density": "--vary = 'mask.density': give a setting and its values, such as ",
    "sweep digits_probmask --vary mask.density=0.1,7 --folder /dev/null": "mask.density = 7.0: give a number in (0, 1]",
    "tost-table digits_tost --tweaks lrs": "--tweaks = 'lrs' is not known: did you mean 'lrsi'?",
    "hessian no_such_run": "run = 'no_such_run'",
    "hessian /dev": "run = '/dev': /dev is not a run: it holds no config.yaml",
    "hessian x --top 0": "argument --top: '0': give a whole number of at least 1",
    "train cifar10_resnet32_probmask --restrat": "unknown arguments: --restrat (see ghostmask --help)",
    "train": "the following arguments are required: CONFIG, key=value (see ghostmask train --help)",
    "find-mask a --out b --c": "unknown arguments: --c",
    "trian x": "argument COMMAND: invalid choice: 'trian'",
    "show": "the following arguments are required: TOPIC",
}
"""The same, tried without starting a process for each."""


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_answered_with_one_line_and_exit_code_2(arguments: str) -> None:
    done = ghostmask(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ghostmask: error: {WRONG[arguments]}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", MORE_WRONG)
def test_every_command_answers_wrong_input_in_the_same_way(
    arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert entry.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ghostmask: error: {MORE_WRONG[arguments]}")
    assert err.count("\n") == 1


def ranks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """From now on this is rank 0 of `size`."""
    launch = {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)


def test_a_batch_that_the_ranks_cannot_share_is_named_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 8)
    with pytest.raises(InputError, match=r"data\.batch_size = 100: give a multiple of 8 \(ranks 8\)"):
        run_command(["train", "cifar10_resnet32_probmask", "data.batch_size=100"])


def imports_of(*arguments: str) -> set[str]:
    """The libraries that a command has imported when it ends."""
    command = [sys.executable, "-X", "importtime", "-m", "ghostmask", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "ghostmask" in found
    return found


def test_settings_are_looked_at_without_deepspeed_and_ffcv() -> None:
    assert not imports_of("show", "config", "digits_probmask") & {"deepspeed", "ffcv"}


@pytest.mark.parametrize("arguments", [["--help"], ["show", "models"], ["train", "x"], ["--version"]])
def test_what_needs_no_torch_imports_none_and_takes_less_than_a_second(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = imports_of(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not imported & {"torch", "deepspeed", "ffcv", "numba", "numpy", "torchvision"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_command_that_starts_its_own_processes_refuses_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 2)
    for command in ("bench mask", "sweep digits_probmask", "tost-table digits_tost", "prepare digits_probmask",
                    "train digits_probmask --ranks 2"):  # fmt: skip
        with pytest.raises(InputError, match="run it without torchrun, srun or --ranks"):
            run_command(command.split())


def test_settings_may_follow_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match=r"mask\.density = 7"):
        run_command(["train", "digits_probmask", "--restart", "mask.density=7"])
    with pytest.raises(InputError, match=r"mask\.density = 7"):
        run_command(["train", "--restart", "digits_probmask", "seed=1", "mask.density=7"])


def test_show_config_prints_what_would_run_and_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["show", "config", "digits_probmask", "mask.density=0.25"]) == 0
    file = tmp_path / "again.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(str(file)) == load_config("digits_probmask", ["mask.density=0.25"])
    assert run_command(["show", "config", "mask.density=0.25"]) == 0
    assert "  density: 0.25\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "names"),
    [("methods", METHODS), ("models", {**MODELS, **OTHERS}), ("datasets", DATASETS), ("configs", shipped_configs())],
)
def test_show_lists_every_name_with_a_line_from_its_source(table: str, names: dict[str, object]) -> None:
    lines = show.TABLES[table]()
    assert [line.split()[0] for line in lines] == list(names)
    assert all(len(line.split()) > 2 for line in lines)


def test_prepare_writes_the_beton_files_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("data.dataset=synthetic", "data.num_train=32", "data.num_eval=8", f"data.root={tmp_path}")
    assert run_command(["prepare", "digits_magnitude", *settings, "data.batch_size=8"]) == 0
    paths = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(paths) == ["train", "eval"]
    assert all(Path(path).is_file() and Path(path).is_relative_to(tmp_path) for path in paths.values())


def test_version_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert re.fullmatch(r"ghostmask \S+ \(torch \S+, deepspeed \S+, ffcv \S+, python \S+\)\n", capsys.readouterr().out)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read_end, write_end = os.pipe()
    process = subprocess.Popen([GHOSTMASK, "show", "config"], stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(read_end)
    os.close(write_end)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == entry.EXIT_BROKEN_PIPE


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RunStopped("saved step 7", EXIT_INTERRUPTED), EXIT_INTERRUPTED, "ghostmask: saved step 7\n"),
        (KeyboardInterrupt(), 130, "ghostmask: interrupted\n"),
        (InputError("two\nlines"), 2, "ghostmask: error: two lines\n"),
    ],
)
def test_each_way_to_stop_has_its_exit_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run_command", stop)
    monkeypatch.delenv("RANK", raising=False)
    assert entry.main([]) == code
    assert capsys.readouterr().err == said


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(BrokenPipeError, match="a worker is gone"):
        entry.main([])


def test_deepspeed_writes_nothing_on_stdout_when_it_is_imported() -> None:
    code = (
        "import json, os; from ghostmask.launcher.environment import prepare_environment; prepare_environment('cpu');"
        "import deepspeed; print(json.dumps(deepspeed.get_accelerator().device_name()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout) == "cpu"


def _parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """(program, its arguments) of a parser and the parsers of its subcommands, in the order of the help texts."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    own = [action for action in parser._actions if action not in below]
    positional = [_written(action) for action in own if not action.option_strings]
    yield parser.prog, positional + [" ".join(action.option_strings) for action in own if action.option_strings]
    for action in below:
        for child in action.choices.values():
            yield from _parsers(child)


def _written(action: argparse.Action) -> str:
    return f"[{action.metavar} ...]" if action.nargs in ("*", "+") else str(action.metavar)


def _all_epilogs() -> str:
    todo, epilogs = [build_parser()], ""
    while todo:
        parser = todo.pop()
        epilogs += f"{parser.epilog or ''}\n"
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += action.choices.values()
    return epilogs
