"""ghostmask find-density: is the setting found, is nothing trained twice, and is it said what was not reached?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ghostmask.engine.errors import InputError, RunStopped
from ghostmask.launcher import find_density as module
from ghostmask.launcher.cells import PlannedRun, accuracy
from ghostmask.launcher.checks import check_steps
from ghostmask.launcher.cli import build_parser, run_command
from ghostmask.launcher.find_density import NOT_FOUND, proposed, searched
from ghostmask.launcher.settings import load_config, to_dict


@dataclass
class Trained:
    """Leaves what a run does, with the density that a curve says; fails at a run number."""

    curve: Callable[[float], float]
    fails_at: int = 0
    penalties: list[float] = field(default_factory=list)

    def __call__(self, run: PlannedRun) -> float:
        done = accuracy(run.config)
        if done is not None:
            return done
        penalty = run.config.mask.penalty  # type: ignore[attr-defined]
        self.penalties.append(penalty)
        if len(self.penalties) == self.fails_at:
            raise RunStopped("stopped by a signal", 75)
        summary = {"accuracy": 0.9, "density": self.curve(penalty), "config": to_dict(run.config)}
        (Path(run.config.run) / "export").mkdir(parents=True)
        (Path(run.config.run) / "export" / "summary.json").write_text(json.dumps(summary))
        return 90.0


def search(monkeypatch: pytest.MonkeyPatch, trained: Trained, folder: Path, *more: str) -> int:
    monkeypatch.setattr(module, "trained", trained)
    return run_command(["find-density", "cifar10_resnet32_l0", "--folder", str(folder), *more])


def curve(penalty: float) -> float:
    return 1 / (1 + (penalty / 3e-5) ** 0.8)


@pytest.mark.parametrize("start", [1e-9, 1e-6, 4e-4, 0.5])
def test_the_setting_is_found_from_far_away_and_what_is_there_is_not_trained_again(
    start: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Trained(curve)
    asked = (f"mask.penalty={start}", "--target", "0.05", "--tolerance", "0.05", "--runs", "14")
    assert search(monkeypatch, trained, tmp_path, *asked) == 0
    table, verdict = capsys.readouterr().out.strip().rsplit("\n", 1)
    value = float(verdict.split("=")[1].split(":")[0])
    assert curve(value) == pytest.approx(0.05, rel=0.05)
    assert verdict.endswith("is within the target 0.05 +- 5%")
    assert len(table.splitlines()) == 2 + len(trained.penalties)
    assert trained.penalties[0] == start
    again = Trained(curve)
    assert search(monkeypatch, again, tmp_path, *asked) == 0
    assert again.penalties == [], "a finished run was repeated"
    assert capsys.readouterr().out == f"{table}\n{verdict}\n"


def test_a_stopped_search_goes_on_at_the_run_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = Trained(curve), Trained(curve, fails_at=3)
    search(monkeypatch, whole, tmp_path / "whole", "--target", "0.05")
    with pytest.raises(RunStopped):
        search(monkeypatch, part, tmp_path / "part", "--target", "0.05")
    rest = Trained(curve)
    search(monkeypatch, rest, tmp_path / "part", "--target", "0.05")
    assert part.penalties[:2] + rest.penalties == whole.penalties
    assert part.penalties[2] == rest.penalties[0]


def test_a_target_that_is_not_reached_is_said_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cliff = Trained(lambda penalty: 0.4 if penalty < 1e-5 else 0.001)
    assert search(monkeypatch, cliff, tmp_path, "--target", "0.3", "--tolerance", "0.01", "--runs", "6") == NOT_FOUND
    verdict = capsys.readouterr().out.strip().splitlines()[-1]
    assert "density 0.4 is the nearest to the target 0.3 +- 1%, which was NOT met in 6 runs" in verdict


def test_a_bracket_is_widened_and_then_halved_in_its_logarithm() -> None:
    assert proposed({}, 0.1, 2e-5) == 2e-5
    assert proposed({1.0: 0.5}, 0.1, 1.0) == 4.0
    assert proposed({1.0: 0.5, 4.0: 0.3}, 0.1, 1.0) == 64.0
    assert proposed({1.0: 0.05}, 0.1, 1.0) == 0.25
    assert proposed({1.0: 0.5, 4.0: 0.3, 64.0: 0.01}, 0.1, 1.0) == 16.0
    assert proposed({1.0: 0.5, 2.0: 0.05, 4.0: 0.3}, 0.1, 1.0) == round(math.sqrt(2), 3), "not monotone: the lower gap"
    assert proposed({1.0: 0.5, 1.0001: 0.05}, 0.1, 1.0) == 1.0, "nothing is left between them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cifar10_resnet32_gmp", "--target", "0.1"],
            "mask.method = 'gmp': is told its density; give mask.density=0.1",
        ),
        (["cifar10_resnet32_l0", "mask.penalty=0", "--target", "0.1"], "mask.penalty = 0.0: the search starts from it"),
        (["cifar10_resnet32_l0", "--over", "mask.gates", "--target", "0.1"], "mask.gates = weight: the search starts "),
        (["cifar10_resnet32_l0", "--target", "0"], "--target: '0': give a number in (0, 1]"),
        (["cifar10_resnet32_l0", "--target", "0.1", "run=a"], "run is given twice"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        run_command(["find-density", *arguments, "--folder", str(tmp_path)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "decided_by"),
    [
        ("cifar10_resnet32_str", "optim.weight_decay"),
        ("cifar10_resnet32_sparse_vd", "mask.penalty"),
        ("imagenet_resnet50_l0", "mask.penalty"),
    ],
)
def test_a_density_that_is_a_result_is_refused_with_the_setting_that_decides_it(config: str, decided_by: str) -> None:
    with pytest.raises(InputError, match=rf"mask\.density = 0\.05: is a result .* decided by {decided_by}; leave it "):
        load_config(config, ["mask.density=0.05"])


def test_thresholds_that_cannot_come_into_reach_are_refused_before_the_run() -> None:
    given = ["mask.method=str", "mask.density=1", "finetune.epochs=0"]
    with pytest.raises(InputError, match=r"mask\.r_init = -3200\.0: weight decay brings it to .* in 440 steps"):
        check_steps(load_config("digits_magnitude", given), 22)
    check_steps(load_config("digits_magnitude", [*given, "mask.r_init=-10"]), 22)
    check_steps(load_config("cifar10_resnet32_str"), 195)


@pytest.mark.parametrize("method", ["str", "probmask", "snip", "l0"])
def test_a_power_is_read_by_magnitude_methods_only(method: str) -> None:
    with pytest.raises(
        InputError, match=r"mask\.power = 2\.0: is not read .* use mask\.method=magnitude or gmp or dnw or lth"
    ):
        load_config("digits_magnitude", [f"mask.method={method}", "mask.density=1", "mask.power=2"])


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COMMANDS = [
    line.partition("ghostmask find-density ")[2]
    for file in sorted(CONFIGS.glob("*.yaml"))
    for line in file.read_text().splitlines()
    if line.startswith("#") and "ghostmask find-density " in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_searches_that_configs_show_have_a_setting_to_start_from(command: str) -> None:
    arguments = build_parser().parse_args(["find-density", *command.split()])
    key, first = searched(load_config(arguments.config, arguments.overrides), arguments.target, arguments.over)
    assert key.startswith(("mask.", "optim."))
    assert first > 0
