"""Does a submitted run finish, on a real Slurm, as the same run, whatever happened to it? And what is said of it?"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_box import Box, Cluster, started_box

NET = """
import os
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, classes))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        if self.calls > 8 and FAILS:
            raise ValueError("this network gives up")
        return self.body(images)

def build(num_classes):
    return Net(num_classes)
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    yield from started_box()


@pytest.fixture
def cluster(box: Box, tmp_path: Path) -> Cluster:
    return Cluster(box, tmp_path)


SHOW = """
import dataclasses, json
from ghostmask.engine.launch import read_launch
print(json.dumps(dataclasses.asdict(read_launch())))
"""


def test_tasks_of_srun_are_ranks_that_meet_at_one_place(cluster: Cluster) -> None:
    said = cluster.box.ask("srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-c", SHOW)
    launches = sorted((json.loads(line) for line in said.splitlines()), key=lambda launch: int(launch["rank"]))
    assert [(launch["rank"], launch["size"], launch["local_rank"], launch["local_size"]) for launch in launches] == [
        (0, 4, 0, 2), (1, 4, 1, 2), (2, 4, 0, 2), (3, 4, 1, 2),
    ]  # fmt: skip
    assert len({(launch["address"], launch["port"]) for launch in launches}) == 1


def test_a_signalled_run_on_two_nodes_is_queued_again_and_is_the_same_run(cluster: Cluster) -> None:
    steps = ("train.epochs=2", "finetune.epochs=1", "checkpoint.every_steps=4")
    gpus = ("--nodes", "2", "--gpus-per-node", "8", "--tasks-per-node", "2", "--time", "10")
    job = cluster.submit("run", *steps, options=gpus)
    again = cluster.call("submit", "plain.yaml", f"run={cluster.folder / 'run'}", *cluster.settings(*steps), code=2)
    assert f"has job {job}; wait for it, or: ghostmask cancel" in again
    cluster.wait_for_step("run", 8)
    cluster.box.ask("scancel", "--signal=USR2", job)
    found = cluster.wait("run", "finished")
    assert (found["requeues"], found["job"], found["total_steps"]) == (1, job, 66)
    starts, ends = cluster.attempts("run", "start"), cluster.attempts("run", "end")
    assert [(a["restart"], a["ranks"], a["nodes"]) for a in starts] == [(0, 4, "node[1-2]"), (1, 4, "node[1-2]")]
    assert [(a["code"], a["again"]) for a in ends] == [(75, True), (0, False)]
    for rank in range(4):
        place = f"rank {rank} of 4 on node{rank // 2 + 1}, number {rank % 2} there, GPUs 0,1,2,3,4,5,6,7"
        assert cluster.log("run", rank).count(place) == 2, "appended, and each attempt on the rank's own node"
    assert f"at step {ends[0]['step']}, phase" in cluster.log("run"), "it went on where it was stopped"
    said = cluster.call("logs", str(cluster.folder / "run"))
    assert "density                      5.0001%" in said
    assert f"| {cluster.folder / 'run'} | finished | {job} | 1 |" in cluster.call("status", str(cluster.folder / "run"))

    cluster.call("train", "plain.yaml", f"run={cluster.folder / 'alone'}", *cluster.settings(*steps))
    assert cluster.exported("run") == cluster.exported("alone"), "4 ranks on 2 nodes, stopped, and 1 rank, undisturbed"


def test_a_sweep_of_which_one_run_fails_says_so_and_runs_the_code_it_was_submitted_with(cluster: Cluster) -> None:
    (cluster.folder / "ournet.py").write_text(NET.replace("FAILS", "'density=0.2-seed=1' in os.environ['SWEPT']"))
    setup = 'export SWEPT=$(grep -o "[^/]*seed=." JOBS | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p")'
    setup = setup.replace("JOBS", str(cluster.folder / "swept" / "array-*" / "job" / "runs.json"))
    (cluster.folder / "site.yaml").write_text(f"partition: train\nsetup:\n  - '{setup}'\n")
    cluster.env["GHOSTMASK_CLUSTER"] = str(cluster.folder / "site.yaml")
    given = cluster.settings("model.name=ournet:build", "train.epochs=2", "finetune.epochs=1")
    settings = [item for item in given if not item.startswith("mask.density")]
    cluster.call(
        "submit", "plain.yaml", f"run={cluster.folder / 'swept'}", *settings, "--time", "5",
        "--sweep", "mask.density=0.3,0.2", "seed=0,1",
    )  # fmt: skip
    (cluster.folder / "ournet.py").write_text("raise RuntimeError('edited after it was submitted')")
    names = [f"swept/density={density}-seed={seed}" for density in (0.3, 0.2) for seed in (0, 1)]
    for name in names:
        cluster.wait(name, "finished", "failed")
    said = cluster.call("table", str(cluster.folder / "swept"), "--csv", str(cluster.folder / "table.csv"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()]
    shown = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert {(row["mask.density"], row["seeds"], row["not finished"]) for row in shown} == {
        ("0.3", "2", ""), ("0.2", "1", "1 failed")
    }  # fmt: skip
    with (cluster.folder / "table.csv").open() as file:
        assert {(row["mask.density"], row["seeds"]) for row in csv.DictReader(file)} == {("0.3", "2"), ("0.2", "1")}
    failed = cluster.standing(names[3])
    assert failed["why"] == "code 1: ValueError: this network gives up"
    assert failed["said"].endswith("ValueError: this network gives up")
    text = cluster.call("status", str(cluster.folder / "swept"))
    assert "ValueError: this network gives up" in text
    assert text.count("| finished |") == 3


def test_the_script_is_printed_and_what_is_wrong_is_one_line(cluster: Cluster) -> None:
    def refused(*arguments: str) -> str:
        text = cluster.call("submit", "plain.yaml", *cluster.settings(), *arguments, code=2)
        assert len(text.splitlines()) == 1
        return text

    options = ("--nodes", "3", "--gpus-per-node", "4", "--partition", "urgent", "--time", "1-2", "--account", "us")
    more = ("--sbatch", "reservation=night", "--sbatch", "exclusive", "--interface", "ib0", "--cpus-per-task", "6")
    said = cluster.call(
        "submit",
        "plain.yaml",
        *cluster.settings("train.replicas=12", "data.batch_size=60"),
        *options,
        *more,
        "--setup",
        "module load cuda",
        "--dry-run",
    )
    for line in (
        "#SBATCH --nodes=3", "#SBATCH --gpus-per-node=4", "#SBATCH --ntasks-per-node=4", "#SBATCH --partition=urgent",
        "#SBATCH --time=1560", "#SBATCH --account=us", "#SBATCH --reservation=night", "#SBATCH --exclusive",
        "#SBATCH --requeue", "#SBATCH --signal=USR2@120", "module load cuda", "export NCCL_SOCKET_IFNAME=ib0",
    ):  # fmt: skip
        assert line in said.splitlines()
    assert re.search(r"^srun .*--cpus-per-task=6", said, re.M)
    assert "  density: 0.05" in said
    fewer = ("--nodes", "3", "--min-nodes", "1")
    twelve = cluster.settings("train.replicas=12", "data.batch_size=60")
    assert "#SBATCH --nodes=1-3" in cluster.call("submit", "plain.yaml", *twelve, *fewer, "--dry-run").splitlines()
    assert "1, 2, 4" in refused(*fewer)
    assert not (cluster.folder / "runs").exists(), "nothing was written"
    assert "error: nodes = 0: give a whole number from 1 to " in refused("--nodes", "0")
    assert "time = 'soon'" in refused("--time", "soon")
    assert "1, 2, 4" in refused("--nodes", "3")
    said = cluster.call("submit", "plain.yaml", *cluster.settings(), "--partition", "nowhere", code=2)
    assert "error: --cluster slurm: sbatch refused the job: " in said.splitlines()[-1]
    assert "--partition: is not read with --cluster local" in refused("--cluster", "local", "--partition", "x")
    assert "--chain: is for one run on Slurm" in refused("--cluster", "local", "--chain", "2")
    cluster.env["GHOSTMASK_CLUSTER"] = str(cluster.folder / "no.yaml")
    assert "there is no such file" in refused()
    (cluster.folder / "no.yaml").write_text("gpus: 3\n")
    assert "gpus_per_node" in refused()


def test_a_local_job_runs_here_and_one_without_a_job_is_told_of(cluster: Cluster) -> None:
    steps = ("train.epochs=2", "finetune.epochs=1")
    cluster.submit("here", *steps, options=("--cluster", "local", "--tasks-per-node", "2", "--time", "5"))
    assert cluster.standing("here")["state"] != "finished", "submit does not wait, though a pipe reads what it says"
    found = cluster.wait("here", "finished")
    assert found["accuracy"] is not None
    assert "rank 0 of 1" in cluster.log("here")
    text = cluster.call(
        "submit", "plain.yaml", f"run={cluster.folder / 'in'}", *cluster.settings(*steps), "--cluster", "debug"
    )
    assert "exported model" in text
    assert cluster.exported("in") == cluster.exported("here")
    assert "no job was submitted for it" in cluster.call("logs", str(cluster.folder / "in"), code=2)
    assert cluster.standing("in")["state"] == "finished"
    assert json.loads(cluster.call("status", "--json")) == []
