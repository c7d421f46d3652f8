"""A real Slurm of three pretended machines in this one, and `ghostmask` commands on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent / "slurm" / "box.sh"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd", "ip")
REQUIRED = "GHOSTMASK_NEEDS_SLURM"
"""Set where a test that cannot have its Slurm must fail instead of being skipped, as .ci/run does."""
WAIT_S = 150.0
LONGEST = 107 - len("/state/node1/node1_12345678.1234567890")
"""Characters of the folder of a box, in which Slurm has sockets."""


class Box:
    """The running cluster: nodes node1 to node3 of 8 cores and 8 GPUs each."""

    def __init__(self, folder: Path, net: str) -> None:
        self.folder, self.data = folder, folder.with_name("data")
        self.env = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "BOX": str(folder),
            "NET": net,
            "NODES": "3",
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        }

    def do(self, *words: str) -> None:
        """A command of box.sh."""
        log = self.folder.with_suffix(".log")
        with log.open("a") as out:
            env = os.environ | self.env
            done = subprocess.run(
                ["bash", str(SCRIPT), *words], env=env, stdout=out, stderr=out, timeout=120, check=False
            )
        assert done.returncode == 0, log.read_text()

    def ask(self, *command: str) -> str:
        """What a command of Slurm's prints."""
        return subprocess.run(
            command, env=os.environ | self.env, capture_output=True, text=True, timeout=60, check=True
        ).stdout


def started_box(net: str = "lo") -> Iterator[Box]:
    """The body of a fixture: a box, which is always stopped, in a temporary folder of a short name. net: "ns" where a
    node is to be cut off its network."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-")) / "box"
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    reason = f"no Slurm here ({', '.join(missing)} missing; see .ci/slurm.sh)" if missing else ""
    if not reason and os.geteuid() != 0:
        reason = "a Slurm of pretended machines needs root"
    if not reason and len(str(folder)) > LONGEST:
        reason = f"TMPDIR has too long a name for Slurm's sockets: {folder}"
    if reason and os.environ.get(REQUIRED):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    box = Box(folder, net)
    try:
        box.do("start")
        yield box
    finally:
        box.do("stop")


class Cluster:
    """`ghostmask` on a box, in a folder of its own with the digits prepared."""

    DATA = ("model.name=digits_resnet", "data.dataset=digits", "data.num_workers=1", "data.batch_size=64")
    RUN = ("mask.method=probmask", "mask.density=0.05", "mask.lr=0.06", "optim.lr=0.1", "train.threads=1",
           "train.replicas=4", "train.log_every=1", "checkpoint.every_minutes=0")  # fmt: skip

    def __init__(self, box: Box, folder: Path) -> None:
        self.box, self.folder = box, folder
        (folder / "plain.yaml").touch()
        self.env = os.environ | box.env | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if not (box.data / "beton").exists():
            self.call("prepare", "plain.yaml", *self.settings())

    def settings(self, *more: str) -> list[str]:
        """Settings of a small run; `more` go before."""
        given = {item.partition("=")[0]: item for item in (*self.DATA, *self.RUN, *more)}
        return [*given.values(), f"data.root={self.box.data}"]

    def call(self, *arguments: str, code: int = 0) -> str:
        """Run a command; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "ghostmask", *arguments], cwd=self.folder, env=self.env, text=True, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        return done.stdout

    def submit(self, run: str, *settings: str, options: tuple[str, ...] = ()) -> str:
        """Submit a small run; returns its job."""
        self.call("submit", "plain.yaml", f"run={self.folder / run}", *self.settings(*settings), *options)
        return str(json.loads((self.folder / run / "job.json").read_text())["ids"][0])

    def standing(self, run: str) -> dict[str, Any]:
        """What `status --json` says of a run."""
        found = json.loads(self.call("status", "--json", f"{self.folder / run}"))
        return dict(found[0])

    def wait(self, run: str, *states: str, seconds: float = WAIT_S) -> dict[str, Any]:
        """Its standing once its state is one of `states`, and its job has left the queue."""
        end = time.monotonic() + seconds
        while (found := self.standing(run))["state"] not in states or self.in_queue(found["job"]):
            assert time.monotonic() < end, f"{found}\n{self.log(run)}"
            time.sleep(0.5)
        return found

    def in_queue(self, job: str) -> bool:
        """Whether Slurm has still something to do for a job."""
        return bool(job) and job in self.box.ask("squeue", "-h", "-r", "-o", "%i")

    def wait_for(self, run: str, condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
        """Until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log(run)
            time.sleep(0.1)

    def wait_for_step(self, run: str, step: int) -> None:
        """Until the run has saved `step` or a later one."""

        def saved() -> bool:
            names = [path.name[5:13] for path in (self.folder / run / "checkpoints").glob("step-*")]
            return any(int(name) >= step for name in names)

        self.wait_for(run, saved)

    def log(self, run: str, rank: int = 0) -> str:
        """What a rank printed, and the whole of Slurm's words."""
        logs = sorted((self.folder / run / "job").glob(f"*_{rank}_log.out"))
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def attempts(self, run: str, event: str) -> list[dict[str, Any]]:
        """The starts, or ends, of a run's jobs."""
        lines = (self.folder / run / "job" / "attempts.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def exported(self, run: str) -> bytes:
        """The network that came out."""
        return (self.folder / run / "export" / "model.safetensors").read_bytes()
