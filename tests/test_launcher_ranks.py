"""Ranks that fail, are killed, stopped or sent a signal: real processes, one line that says it, the right exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ghostmask.engine.spawn import free_port
from ghostmask.launcher.main import main

SMALL = ["train.epochs=200", "finetune.epochs=1", "train.log_every=1", "mask.density=0.1", "train.threads=1"]
AGAIN = "run the same command again, without --restart"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert main(["prepare", "digits_probmask", f"data.root={folder}"]) == 0
    return folder


class Started:
    """Ranks started by hand, as by a launcher that knows nothing of torch; rank 0 keeps the store."""

    def __init__(self, folder: Path, commands: list[list[str]]) -> None:
        self.logs = [folder / f"rank-{rank}.log" for rank in range(len(commands))]
        port, size = free_port(), len(commands)
        self.ranks = []
        for rank, command in enumerate(commands):
            ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            env = {**os.environ, **{name: str(value) for name, value in ranks.items()}}
            if size > 1:
                env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            with self.logs[rank].open("w") as output:
                start = [sys.executable, "-m", "ghostmask", *command]
                self.ranks.append(subprocess.Popen(start, env=env, stdout=output, stderr=output))

    def codes(self, timeout_s: float = 120) -> list[int]:
        return [process.wait(timeout_s) for process in self.ranks]

    def said(self) -> list[str]:
        """What ghostmask said on all ranks, without training's lines and what it says of anything that takes long."""
        lines = [line for log in self.logs for line in log.read_text().splitlines()]
        assert not any("Traceback" in line for line in lines), lines
        return of_ghostmask(lines)


def of_ghostmask(lines: list[str]) -> list[str]:
    """What it said, but for what it waits for."""
    said = [line for line in lines if line.startswith("ghostmask: ")]
    return [line for line in said if not line.endswith(" so far") and "loading torch" not in line]


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    every: list[Started] = []

    def begin(*commands: list[str]) -> Started:
        every.append(Started(tmp_path, list(commands)))
        return every[-1]

    yield begin
    for started in every:
        for process in started.ranks:
            process.kill()
            process.wait()


def train(folder: Path, root: Path, *more: str) -> list[str]:
    return ["train", "digits_probmask", f"run={folder}", f"data.root={root}", *SMALL, *more]


def wait_for_step(folder: Path, step: int, ranks: list[subprocess.Popen[bytes]], log: Path) -> None:
    file, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_text().count("\n") < step:  # train.log_every=1
        assert all(process.poll() is None for process in ranks), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_file_that_one_rank_lacks_ends_all_ranks_in_one_line_before_they_meet(
    failing: int, start: Start, root: Path, tmp_path: Path
) -> None:
    commands = [train(tmp_path / "run", root) for _ in range(2)]
    commands[failing][1] = "nowhere.yaml"
    started = start(*commands)
    assert started.codes() == [2, 2]
    (line,) = started.said()
    assert line.startswith(f"ghostmask: rank {failing} on host {os.uname().nodename}: error: config = 'nowhere.yaml'")


@pytest.mark.soak
def test_data_that_two_of_three_ranks_lack_are_named_in_one_line(start: Start, root: Path, tmp_path: Path) -> None:
    command = train(tmp_path / "run", root, "train.replicas=3", "data.batch_size=66")
    lacking = [item.replace(str(root), str(tmp_path / "nowhere")) for item in command]
    started = start(command, lacking, lacking)
    assert started.codes() == [2, 2, 2]
    (line,) = started.said()
    assert line.startswith(f"ghostmask: ranks 1-2 on host {os.uname().nodename}: error: data.root = ")


def test_a_killed_rank_is_named_and_its_peer_says_to_run_again(start: Start, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = start(train(folder, root), train(folder, root))
    wait_for_step(folder, 3, started.ranks, started.logs[0])
    started.ranks[1].kill()
    assert started.codes() == [76, -signal.SIGKILL]
    host = os.uname().nodename
    assert started.said() == [f"ghostmask: lost contact to rank 1 on host {host}, which left no word; {AGAIN}"]


def test_ranks_that_the_parts_do_not_fit_wait_where_torchrun_starts_ranks_again(
    start: Start, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    command = train(tmp_path / "run", root, "train.replicas=2")
    command[command.index("train.epochs=200")] = "train.epochs=2"
    started = start(command, command, command)
    assert started.codes() == [0, 0, 0]
    assert "ghostmask: 3 ranks do not fit the run's parts: 2 of them train, 1 waits" in started.said()
    assert "resuming" not in started.logs[0].read_text()


@pytest.mark.soak
def test_a_waiting_rank_ends_with_the_rank_that_it_waits_for_and_ends_nobody(
    start: Start, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    folder = tmp_path / "run"
    command = train(folder, root, "train.replicas=2")
    started = start(command, command, command, command)
    wait_for_step(folder, 3, started.ranks, started.logs[0])
    started.ranks[2].send_signal(signal.SIGTERM)
    assert started.ranks[2].wait(60) == 75
    wait_for_step(folder, 20, started.ranks[:2], started.logs[0])
    started.ranks[0].kill()
    assert started.codes() == [-signal.SIGKILL, 76, 75, 76]


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_stopped_rank_is_named_and_stacks_are_in_the_run_folder(
    stopped: int, start: Start, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = train(folder, root, "train.timeout_minutes=0.1")
    started = start(command, command)
    wait_for_step(folder, 3, started.ranks, started.logs[0])
    started.ranks[stopped].send_signal(signal.SIGSTOP)
    other = 1 - stopped
    assert started.ranks[other].wait(60) == 77
    said = started.said()
    assert len(said) == 2, said
    for line in said:
        assert f"no sign of rank {stopped} on host {os.uname().nodename} (process {started.ranks[stopped].pid}" in line
    assert said[1].endswith(AGAIN)
    assert "engine/trainer.py" in (folder / "hang" / f"stacks-rank-{other}.txt").read_text()
    assert (folder / "hang" / f"gloo_trace_{other}").stat().st_size > 0
    started.ranks[stopped].send_signal(signal.SIGCONT)
    assert started.ranks[stopped].wait(60) in (76, 77)


@pytest.mark.soak
def test_a_signal_to_one_rank_saves_and_stops_all(start: Start, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = start(train(folder, root), train(folder, root))
    wait_for_step(folder, 3, started.ranks, started.logs[0])
    started.ranks[1].send_signal(signal.SIGUSR2)
    assert started.codes() == [75, 75]
    (line,) = started.said()
    assert line.startswith("ghostmask: stopped by a signal; saved at step ")
    assert line.endswith(AGAIN)


def test_ranks_option_starts_ranks_passes_a_signal_on_and_ends_with_their_code(root: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "ghostmask", *train(folder, root), "--ranks", "2"]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for_step(folder, 3, [process], log)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 75
    finally:
        process.kill()
    lines = of_ghostmask(log.read_text().splitlines())
    assert len(lines) == 1, lines
    assert "saved at step" in lines[0]
    command[-3:] = ["--ranks=2", "optim.lr=x"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert len(of_ghostmask(refused.stderr.splitlines())) == 1, refused.stderr
