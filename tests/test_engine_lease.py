"""Has a folder one owner at a time, whatever is done to processes, and does a former owner know before it writes?"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostmask.engine.checkpoint.files import checkpoints
from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.errors import EXIT_NOT_OWNER, InputError, RunStopped
from ghostmask.engine.lease import Lease, NotOwner, owner_of
from ghostmask.engine.metrics import MetricWriter
from ghostmask.engine.world import single

OWNER = """
import sys, time
from pathlib import Path
from ghostmask.engine.errors import RunStopped
from ghostmask.engine.lease import Lease
lease = Lease.take(Path(sys.argv[1]), float(sys.argv[2]))
print("owns", flush=True)
for word in sys.stdin:
    try:
        lease.check()
        print("still owns", flush=True)
    except RunStopped as stop:
        print(stop.exit_code, stop, flush=True)
"""


class OtherProcess:
    """A process that owns a folder and says, when asked, whether it still does."""

    def __init__(self, folder: Path, silence_s: float = 60.0) -> None:
        command = [sys.executable, "-c", OWNER, str(folder), str(silence_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == "owns"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def asked(self) -> str:
        assert self.process.stdin is not None
        print("?", file=self.process.stdin, flush=True)
        return self.answer()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
        if number == signal.SIGSTOP:
            await_stop(self.process.pid)


def await_stop(pid: int) -> None:
    """Return when a process that was sent SIGSTOP has stopped."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


@pytest.fixture
def others() -> Iterator[list[OtherProcess]]:
    started: list[OtherProcess] = []
    yield started
    for other in started:
        other.process.kill()
        other.process.communicate()


def elsewhere(folder: Path, **changes: Any) -> Path:
    """Make the owner of a folder one of another machine, whose processes cannot be seen from here."""
    (file,) = [path for path in (folder / ".lease").iterdir() if path.name.isdecimal()]
    values = json.loads(file.read_text()) | {"boot": "another", "host": "node7", **changes}
    stat = file.stat()
    file.write_text(json.dumps(values))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return file


def test_a_live_owner_is_named_and_keeps_the_folder(tmp_path: Path, others: list[OtherProcess]) -> None:
    others.append(OtherProcess(tmp_path))
    with pytest.raises(
        InputError, match=rf"process {others[0].process.pid} on \S+ is at work in it; wait for it, stop"
    ):
        Lease.take(tmp_path)
    assert others[0].asked() == "still owns"


def test_a_killed_owner_is_succeeded_at_once(tmp_path: Path, others: list[OtherProcess]) -> None:
    others.append(OtherProcess(tmp_path))
    others[0].signal(signal.SIGKILL)
    start = time.monotonic()
    lease = Lease.take(tmp_path)
    assert time.monotonic() - start < 5, "a process that is gone needs no waiting"
    lease.check()
    lease.release()


def test_a_folder_that_was_given_back_is_free(tmp_path: Path) -> None:
    for _ in range(3):
        lease = Lease.take(tmp_path)
        owner = owner_of(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
        lease.release()
        assert owner_of(tmp_path) is None
        assert len(list((tmp_path / ".lease").iterdir())) == 1


def test_a_stopped_owner_is_succeeded_after_its_silence_and_knows_when_it_comes_back(
    tmp_path: Path, others: list[OtherProcess]
) -> None:
    others.append(OtherProcess(tmp_path, 1.5))
    others[0].signal(signal.SIGSTOP)
    said: list[str] = []
    lease = Lease.take(tmp_path, 1.5, said.append)
    assert len(said) == 1
    assert f"belongs to process {others[0].process.pid}" in said[0]
    others[0].signal(signal.SIGCONT)
    answer = others[0].asked()
    assert answer.startswith(f"{EXIT_NOT_OWNER} run = '{tmp_path}': process {os.getpid()} on ")
    lease.check()
    lease.release()


def test_an_owner_elsewhere_that_is_heard_keeps_the_folder_and_a_silent_one_loses_it(tmp_path: Path) -> None:
    owner = Lease.take(tmp_path, 4.0)
    elsewhere(tmp_path)
    with pytest.raises(InputError, match="on node7 is at work in it"):
        Lease.take(tmp_path)
    owner._over.set()  # cut off: it renews nothing any more
    owner._thread.join()
    successor = Lease.take(tmp_path, 4.0)
    with pytest.raises(NotOwner):
        owner.check()
    successor.check()
    owner.release()
    assert owner_of(tmp_path) is not None, "who lost a folder must not give it away"
    successor.release()


@pytest.mark.parametrize("jump_s", [-(10**8), 10**8])
def test_no_clock_decides(jump_s: int, tmp_path: Path) -> None:
    owner = Lease.take(tmp_path, 4.0)
    file = elsewhere(tmp_path)
    now = file.stat().st_mtime_ns + jump_s * 10**9
    os.utime(file, ns=(now, now))
    with pytest.raises(InputError, match="is at work in it"):
        Lease.take(tmp_path)
    owner.check()
    owner.release()


def test_slurm_gives_a_requeued_job_its_folder_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    before = Lease.take(tmp_path)
    elsewhere(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = time.monotonic()
    Lease.take(tmp_path).release()
    assert time.monotonic() - start < 5
    with pytest.raises(NotOwner):
        before.check()


RACE = """
import sys
from pathlib import Path
from ghostmask.engine.errors import InputError
from ghostmask.engine.lease import Lease
sys.stdin.readline()
try:
    Lease.take(Path(sys.argv[1]))
    print("won", flush=True)
except InputError:
    print("lost", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_start_at_once_one_wins(links: bool, tmp_path: Path) -> None:
    no_links = "import os\ndef link(*a): raise OSError(95, 'no links here')\nos.link = link\n"
    command = [sys.executable, "-c", RACE if links else no_links + RACE, str(tmp_path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(6)]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate("over\n")
    assert sorted(results) == ["lost"] * 5 + ["won"]


def junk(path: Path) -> None:
    path.write_bytes(b"\xff{")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [junk, folder, os.mkfifo, Path.touch])
def test_whatever_lies_under_the_name_of_a_lease_gets_an_answer(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostmask.engine.lease.SILENCE_S", 1.0)
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / ".lease") if make is not folder else junk(tmp_path / "run" / ".lease")
    with pytest.raises(InputError, match="cannot be owned"):
        Lease.take(tmp_path / "run")
    (tmp_path / "other" / ".lease").mkdir(parents=True)
    make(tmp_path / "other" / ".lease" / "00000004")
    if make in (junk, Path.touch):
        Lease.take(tmp_path / "other").release()
    else:
        with pytest.raises(InputError, match="cannot be owned"):
            Lease.take(tmp_path / "other")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(InputError, match=r"cannot be owned \(No space left on device\); free the disk") as caught:
        Lease.take(tmp_path)
    assert "\n" not in str(caught.value)


def test_who_lost_the_folder_publishes_no_checkpoint_and_no_line(tmp_path: Path) -> None:
    owner = Lease.take(tmp_path, 60.0)
    store = CheckpointStore(tmp_path / "checkpoints", single(), lease=owner, run="a")
    writer = MetricWriter(tmp_path, single(), None, owner.holds)
    store.save(1, {"w": torch.ones(3)}, {})
    writer.scalars(1, {"loss": 1.0})
    assert store.wait()
    elsewhere(tmp_path, released=True)  # as if it had been silent for its time
    successor = Lease.take(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    owner._verified -= 60.0
    writer.scalars(2, {"loss": 1.0})
    writer.close()
    store.save(2, {"w": torch.ones(3)}, {})
    with pytest.raises(RunStopped) as caught:
        store.wait()
    assert caught.value.exit_code == EXIT_NOT_OWNER
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    successor.release()


def test_a_checkpoint_in_the_making_dies_with_the_ownership(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check of the old owner may come before the take-over and its rename after it."""
    from ghostmask.engine.checkpoint import files

    store = CheckpointStore(tmp_path / "checkpoints", single(), lease=Lease.take(tmp_path), run="a")
    publish = files.publish

    def taken_over_meanwhile(*arguments: Any) -> Path:
        elsewhere(tmp_path, released=True)
        Lease.take(tmp_path)
        files.clear_unfinished(tmp_path / "checkpoints")
        return publish(*arguments)

    monkeypatch.setattr("ghostmask.engine.checkpoint.store.publish", taken_over_meanwhile)
    store.save(1, {"w": torch.ones(3)}, {})
    with pytest.raises(RunStopped, match="owns it now"):
        store.wait()
    assert checkpoints(tmp_path / "checkpoints") == []
