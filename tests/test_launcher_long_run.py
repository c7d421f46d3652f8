"""ResNet-50 on photographs for hundreds of steps, killed twice, on 2, 1 and 2 ranks: does anything grow?"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ghostmask.launcher.main import main

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

NUM_TRAIN, NUM_EVAL = 100, 10
"""Photographs of each of 10 classes."""
SETTINGS = [
    "data.batch_size=8", "train.replicas=2", "train.epochs=2", "finetune.epochs=0", "train.log_every=1",
    "mask.samples=1", "mask.density=0.05", "optim.warmup=0ep", "optim.lr=1e-3", "checkpoint.every_steps=25",
]  # fmt: skip
"""250 steps."""
SETTLED = 50
"""Steps of a process after which nothing may grow."""


@dataclass
class Growth:
    """What each rank of an attempt held, by step: resident bytes, threads, open files."""

    resident: dict[int, list[int]] = field(default_factory=dict)
    threads: dict[int, list[int]] = field(default_factory=dict)
    files: dict[int, list[int]] = field(default_factory=dict)

    def look(self, step: int, ranks: list[int]) -> None:
        """A value per rank."""
        self.resident[step] = [4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in ranks]
        self.threads[step] = [len(os.listdir(f"/proc/{pid}/task")) for pid in ranks]
        self.files[step] = [len(os.listdir(f"/proc/{pid}/fd")) for pid in ranks]


def ranks_of(launcher: int) -> list[int]:
    """Its ranks' processes, or itself, where it is the only rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = [int(pid) for pid in children if b"ghostmask\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return sorted(found) or [launcher]


def last_step(run: Path) -> int:
    """Of metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def attempt(run: Path, root: Path, num_ranks: int, until: int | None) -> tuple[Growth, int | None]:
    """Train until step `until`, where all is killed at once, or to the end; what was held, and the exit code."""
    command = [sys.executable, "-m", "ghostmask", "train", "imagenet_resnet50_probmask", f"run={run}"]
    several = ["--ranks", str(num_ranks)] if num_ranks > 1 else []
    growth, seen, start = Growth(), 0, last_step(run)
    with (run.parent / "log").open("a") as log:
        process = subprocess.Popen([*command, f"data.root={root}", *SETTINGS, *several], stdout=log, stderr=log)
        while process.poll() is None:
            step = last_step(run)
            if until is not None and step >= until:
                for pid in {*ranks_of(process.pid), process.pid}:
                    os.kill(pid, signal.SIGKILL)
                process.wait()
                return growth, None
            if step > max(seen, start):
                seen = step
                ranks = ranks_of(process.pid)
                if len(ranks) == num_ranks:
                    growth.look(step, ranks)
            time.sleep(0.1)
    return growth, process.returncode


def test_memory_threads_and_files_of_a_long_run_do_not_grow(shared_folder: Path, tmp_path: Path) -> None:
    root, run = tmp_path / "data", tmp_path / "run"
    for split, most in (("train", NUM_TRAIN), ("val", NUM_EVAL)):
        for folder in sorted((shared_folder / "data" / "imagenette224" / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:most]:
                (root / split / folder.name / file.name).symlink_to(file)
    assert main(["prepare", "imagenet_resnet50_probmask", f"data.root={root}"]) == 0

    attempt(run, root, 2, until=40)
    attempt(run, root, 1, until=80)
    growth, code = attempt(run, root, 2, until=None)
    assert code == 0, (tmp_path / "log").read_text()[-3000:]

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 250
    assert all(map(math.isfinite, losses))
    assert json.loads((run / "export" / "summary.json").read_text())["density"] == pytest.approx(0.05, abs=1e-4)

    steps = sorted(growth.resident)
    settled = [step for step in steps if step >= steps[0] + SETTLED]
    half = len(settled) // 2
    assert half > 30
    for rank in range(2):
        early, late = (
            statistics.median(growth.resident[step][rank] for step in part) for part in (settled[:half], settled[half:])
        )
        print(f"rank {rank}: {early / 1e6:.0f} MB, then {late / 1e6:.0f} MB; {len(settled)} steps")
        assert late <= 1.03 * early
        for counted in (growth.threads, growth.files):
            first, second = (max(counted[step][rank] for step in part) for part in (settled[:half], settled[half:]))
            print(f"rank {rank}: at most {first}, then {second}")
            assert second <= first
