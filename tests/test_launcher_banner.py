"""Does a run say what it is and what goes on: on the screen at once, before the first step, and while it takes long?"""

from __future__ import annotations

import io
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from memory_data import MemoryData
from memory_run import CONFIG, configured, memory_run
from terminal import shown_on_a_terminal

from ghostmask.engine.progress import Progress
from ghostmask.engine.pulse import Pulse
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.waiting import Waiting
from ghostmask.engine.world import World, single
from ghostmask.launcher.banner import SaysCheckpoints, banner

START = [sys.executable, "-m", "ghostmask"]
SMALL = ("train.epochs=2", "finetune.epochs=1", "mask.samples=1")


def test_what_takes_long_is_said_again_and_again_and_stops_with_it() -> None:
    pulse = Pulse()
    waiting = Waiting(pulse, quiet_s=5.0)
    pulse.enter("finding the mask: snip")
    start = pulse.since
    said = [s for s in range(100) if waiting.due(start + s)]
    assert said == [5, 15, 35, 75]  # 5 s of silence, then 10, 20, 40
    pulse.tick("finding the mask, batch 3")
    assert waiting.due(start + 200) == "ghostmask: finding the mask, batch 3: 200 s so far"
    pulse.enter("opening the data")
    assert waiting.due(pulse.since + 4.9) == ""
    assert waiting.due(start + 300) != ""


def test_ordinary_steps_are_said_until_the_first_report_only() -> None:
    world = single()
    waiting = Waiting(world.pulse, quiet_s=5.0)
    world.pulse.step("step 1 of phase search")
    now = time.monotonic()
    assert "step 1 of phase search" in waiting.due(now + 6)
    Progress(world, 10, io.StringIO()).update(2, {"loss": 1.0})
    assert waiting.due(now + 1000) == ""
    world.pulse.enter("end of epoch 0")
    assert "end of epoch 0" in waiting.due(now + 2000)


def test_a_line_that_was_just_printed_is_not_followed_at_once() -> None:
    world = single()
    waiting = Waiting(world.pulse, quiet_s=5.0)
    world.pulse.enter("looking")
    Progress(world, 10, io.StringIO()).message("mask: density 0.1")
    world.pulse.said += 3
    assert waiting.due(world.pulse.since + 5.5) == ""


def test_the_thread_prints_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    pulse = Pulse(what="compiling")
    waiting = Waiting(pulse, quiet_s=0.05)
    waiting.start()
    deadline = time.monotonic() + 20
    said = ""
    while "compiling" not in said and time.monotonic() < deadline:
        time.sleep(0.02)
        said += capfd.readouterr().err
    waiting.stop()
    assert "ghostmask: compiling: " in said


def told(world: World, folder: Path) -> tuple[str, int, int, list[str]]:
    """The banner of a short run, its weights and images, and what it said of its checkpoints."""
    data, config = MemoryData(world), configured(CONFIG, train={"epochs": 2}, finetune={"epochs": 0})
    run, saved = memory_run(world, folder, replace(config, run=str(folder)), data)
    said: list[str] = []
    vars(run.reporter.progress)["message"] = said.append
    text, weights = banner(run), sum(w.numel() for w in run.method.weights.values())
    run.hooks = (SaysCheckpoints(),)
    run.execute(saved)
    run.close()
    return text, weights, data.num_train, [line for line in said if line.startswith("checkpoints of")]


def test_a_banner_tells_what_the_run_is(tmp_path: Path) -> None:
    first, second = run_distributed(told, 2, tmp_path / "run")
    text, weights, images, said = first
    for part in ("conv4", f"{weights:,} prunable", "probmask at density 0.1", f"{images} + ",
                 "in 4 parts (train.replicas), 2 noise samples each", "2 x CPU, fp32, ZeRO stage 1",
                 "search 2 epochs, 8 steps; 4 steps an epoch", str(tmp_path / "run")):  # fmt: skip
        assert part in text, text
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    on_disk = sum(path.stat().st_size for path in newest.iterdir()) / 1e6
    (line,) = said
    assert float(line.split()[2]) == pytest.approx(on_disk, rel=0.1, abs=0.1)
    assert len(second[3]) == 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    done = subprocess.run(
        [*START, "prepare", "digits_probmask", f"data.root={folder}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_dry_run_says_time_memory_and_disk_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "dry"
    arguments = ["train", "digits_probmask", f"data.root={root}", f"run={run}", "--dry-run", *SMALL]
    done = subprocess.run([*START, *arguments], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("hours for 3 epochs", "GB memory a rank", "checkpoints of", "MB are free", "digits_resnet", str(run),
                 "dry run: 0 failed"):  # fmt: skip
        assert part in done.stdout, done.stdout
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "runs"])


def test_something_is_on_a_terminal_at_once(tmp_path: Path) -> None:
    """Before the settings, which import torch, are looked at."""
    command = [*START, "train", "digits_probmask", "optim.lr=-1", f"run={tmp_path / 'run'}"]
    code, seen = shown_on_a_terminal(command)
    assert code == 2
    lines = seen.splitlines()
    assert "loading torch, DeepSpeed and FFCV" in lines[0]
    assert "optim.lr" in lines[1]
