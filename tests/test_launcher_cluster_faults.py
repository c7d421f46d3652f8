"""What a cluster does to a run: is it the same run in the end, and what is lost? The whole matrix, in `make soak`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_box import Box, Cluster, started_box

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

TWO = ("--nodes", "2", "--tasks-per-node", "1", "--time", "10")
STEPS = ("train.epochs=12", "finetune.epochs=1", "checkpoint.every_steps=10")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 64 MiB, mounted before the nodes start: each has the mounts that were there then."""
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Box]:
    yield from started_box("ns")


@pytest.fixture(scope="module")
def undisturbed(box: Box, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The network of the run that nothing happened to."""
    cluster = Cluster(box, tmp_path_factory.mktemp("undisturbed"))
    cluster.call("train", "plain.yaml", f"run={cluster.folder / 'run'}", *cluster.settings(*STEPS))
    return cluster.exported("run")


@pytest.fixture
def cluster(box: Box, tmp_path: Path) -> Cluster:
    return Cluster(box, tmp_path)


def finished(cluster: Cluster, undisturbed: bytes, requeues: int) -> None:
    """The run ends as if nothing had happened, and says what did."""
    found = cluster.wait("run", "finished", "failed", "cancelled", seconds=400)
    assert (found["state"], found["requeues"]) == ("finished", requeues), found
    assert cluster.exported("run") == undisturbed
    steps = [json.loads(line)["step"] for line in (cluster.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "nobody wrote beside the owner"
    starts, ends = cluster.attempts("run", "start"), cluster.attempts("run", "end")
    print(json.dumps({"test": os.environ.get("PYTEST_CURRENT_TEST", ""), "starts": starts, "ends": ends}))


def test_time_limit_shorter_than_the_run(cluster: Cluster) -> None:
    """Slurm looks at limits now and then: it signals up to a minute early."""
    long = ("train.epochs=80", "finetune.epochs=1", "checkpoint.every_steps=100000")
    cluster.submit("run", *long, options=(*TWO[:4], "--time", "2", "--signal-s", "30"))
    found = cluster.wait("run", "finished", "failed", seconds=900)
    assert found["state"] == "finished"
    assert found["requeues"] >= 2
    cluster.call("train", "plain.yaml", f"run={cluster.folder / 'alone'}", *cluster.settings(*long))
    assert cluster.exported("run") == cluster.exported("alone")


@pytest.mark.parametrize("how", ["USR2", "TERM"])
def test_preemption_by_signal_alone(cluster: Cluster, undisturbed: bytes, how: str) -> None:
    job = cluster.submit("run", *STEPS, options=TWO)
    cluster.wait_for_step("run", 30)
    began = time.monotonic()
    cluster.box.ask("scancel", f"--signal={how}", job)
    cluster.wait_for("run", lambda: len(cluster.attempts("run", "start")) == 2)
    print(f"{how}: {time.monotonic() - began:.1f} s until it runs again")
    assert cluster.attempts("run", "end")[0]["code"] == 75
    finished(cluster, undisturbed, 1)


def test_preemption_by_a_higher_partition(cluster: Cluster, undisturbed: bytes) -> None:
    cluster.submit("run", *STEPS, options=TWO)
    cluster.wait_for_step("run", 30)
    cluster.box.ask("sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    finished(cluster, undisturbed, 1)


@pytest.mark.parametrize("node", ["1", "2"])
def test_a_node_is_powered_off(cluster: Cluster, undisturbed: bytes, node: str) -> None:
    cluster.submit("run", *STEPS, options=TWO)
    cluster.wait_for_step("run", 30)
    began = time.monotonic()
    cluster.box.do("fail", node)
    try:
        cluster.wait_for("run", lambda: len(cluster.attempts("run", "start")) == 2)
        print(f"node {node} off: {time.monotonic() - began:.1f} s until it runs again")
        finished(cluster, undisturbed, 1)
    finally:
        cluster.box.do("node", node)
        time.sleep(5)


def test_a_node_is_cut_off_and_comes_back(cluster: Cluster, undisturbed: bytes) -> None:
    """Of rank 0, which owns the folder: it must not write once another has taken it over."""
    cluster.submit("run", *STEPS, "checkpoint.takeover_s=10", options=TWO)
    cluster.wait_for_step("run", 30)
    began = time.monotonic()
    cluster.box.do("cut", "1")
    try:
        cluster.wait_for("run", lambda: len(cluster.attempts("run", "start")) == 2)
        print(f"cut off: {time.monotonic() - began:.1f} s until it runs again")
    finally:
        cluster.box.do("heal", "1")
    finished(cluster, undisturbed, 1)


def test_a_cancelled_run_stays_cancelled_and_can_be_submitted_again(cluster: Cluster, undisturbed: bytes) -> None:
    cluster.submit("run", *STEPS, options=TWO)
    cluster.wait_for_step("run", 30)
    assert "cancelled" in cluster.call("cancel", str(cluster.folder / "run"))
    found = cluster.wait("run", "cancelled")
    assert found["requeues"] == 0
    cluster.submit("run", *STEPS, options=TWO)
    finished(cluster, undisturbed, 0)


def test_a_rank_that_is_killed_each_time_is_not_started_for_ever(cluster: Cluster) -> None:
    (cluster.folder / "ournet.py").write_text(
        "import os, signal\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, c):\n        super().__init__(); self.a = nn.Linear(192, c); self.n = 0\n"
        "    def forward(self, x):\n        self.n += 1\n"
        "        if self.n > 30 and os.environ.get('SLURM_PROCID') == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return self.a(x.flatten(1))\n"
        "def build(num_classes):\n    return Net(num_classes)\n"
    )
    cluster.submit("run", *STEPS, "model.name=ournet:build", "checkpoint.every_steps=1000", options=TWO)
    found = cluster.wait("run", "failed", seconds=400)
    assert (found["requeues"], len(cluster.attempts("run", "end"))) == (2, 3)
    assert "no new checkpoint in several attempts in a row; code 76" in found["why"]


def test_a_disk_that_is_full_for_good_ends_the_job_with_code_4(
    cluster: Cluster, disk: Path, undisturbed: bytes
) -> None:
    run = str(disk / "run")
    cluster.submit(run, *STEPS, "checkpoint.every_steps=5", options=TWO)
    cluster.wait_for_step(run, 10)
    filler = disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], stderr=subprocess.DEVNULL, check=False)
    found = cluster.wait(run, "failed", seconds=400)
    assert found["why"].startswith("code 4"), "trained to its end, and nothing could be saved"
    filler.unlink()
    cluster.submit(run, *STEPS, "checkpoint.every_steps=5", options=TWO)
    cluster.wait(run, "finished", seconds=400)
    assert cluster.exported(run) == undisturbed


def test_a_hung_rank_is_named_and_the_job_goes_on(cluster: Cluster, undisturbed: bytes) -> None:
    cluster.submit("run", *STEPS, "train.timeout_minutes=1", options=(*TWO, "--srun=--wait=20"))
    cluster.wait_for_step("run", 30)
    stopped = [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if b"SLURM_PROCID=1\0" in _environment(path) and b"submitit.core._submit" in _command(path)
        and str(cluster.folder).encode() in _command(path)
    ]  # fmt: skip
    assert stopped
    os.kill(stopped[-1], signal.SIGSTOP)
    finished(cluster, undisturbed, 1)
    assert cluster.attempts("run", "end")[0]["code"] in (76, 77)
    assert "rank 1" in cluster.log("run")


def _environment(path: Path) -> bytes:
    try:
        return (path / "environ").read_bytes()
    except OSError:
        return b""


def _command(path: Path) -> bytes:
    try:
        return (path / "cmdline").read_bytes()
    except OSError:
        return b""


def test_jobs_in_a_chain_go_on_where_the_one_before_stopped(cluster: Cluster, undisturbed: bytes) -> None:
    """A site where no job may queue itself again: there the first one ends with its signal."""
    cluster.submit("run", *STEPS, options=(*TWO, "--chain", "3"))
    first, second, third = json.loads((cluster.folder / "run" / "job.json").read_text())["ids"]
    cluster.wait_for_step("run", 30)
    assert cluster.standing("run")["job"] == first
    cluster.box.ask("scancel", "--signal=TERM", first)
    cluster.wait("run", "finished", seconds=400)
    cluster.wait_for("run", lambda: not cluster.in_queue(third))
    assert [a["job"] for a in cluster.attempts("run", "start")] == [first, second, third]
    assert [a["code"] for a in cluster.attempts("run", "end")] == [75, 0, 0]
    assert cluster.exported("run") == undisturbed


def test_a_site_that_shows_each_task_its_own_gpu(cluster: Cluster) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "2", "--time", "5", "--sbatch", "gpus-per-task=1")
    cluster.submit("run", "train.epochs=2", "finetune.epochs=1", options=options)
    cluster.wait("run", "finished")
    for rank in range(4):
        assert f"rank {rank} of 4 on node{rank // 2 + 1}, number {rank % 2} there, GPUs " in cluster.log("run", rank)
    assert len({cluster.log("run", rank).partition("GPUs ")[2].split()[0] for rank in range(2)}) == 2


def test_a_local_job_goes_on_after_its_time_limit(cluster: Cluster) -> None:
    """submitit's own controller signals 30 s before the limit, and starts the task again for the code that asks so."""
    more = ("train.epochs=60", "finetune.epochs=1", "checkpoint.every_steps=100000")
    cluster.submit("run", *more, options=("--cluster", "local", "--time", "2"))
    assert cluster.wait("run", "finished", seconds=800)["state"] == "finished"
    assert len(cluster.attempts("run", "start")) > 1
    assert "resuming" in cluster.log("run")


def test_srun_in_a_script_of_ones_own(cluster: Cluster, undisturbed: bytes) -> None:
    (cluster.folder / "job.sh").write_text(
        "#!/bin/bash\n"
        f"srun {sys.executable} -m ghostmask train plain.yaml run={cluster.folder / 'run'} "
        f"{' '.join(cluster.settings(*STEPS))}\n"
        "code=$?\n[ $code = 75 ] || [ $code = 76 ] && scontrol requeue $SLURM_JOB_ID\nexit $code\n"
    )
    script = str(cluster.folder / "job.sh")
    wanted = ["sbatch", "-N2", "--ntasks-per-node=1", "--parsable", "-D", str(cluster.folder), "--open-mode=append"]
    output = cluster.folder / "own.log"
    os.environ["PYTHONPATH"] = cluster.env["PYTHONPATH"]
    job = cluster.box.ask(*wanted, "--requeue", "-o", str(output), script).strip()
    cluster.wait_for_step("run", 30)
    cluster.box.ask("scancel", "--signal=USR1", job)
    end = time.monotonic() + 300
    while not (cluster.folder / "run" / "export" / "summary.json").exists():
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.5)
    assert cluster.exported("run") == undisturbed
    assert "resuming" in output.read_text()
