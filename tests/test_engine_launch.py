"""Is the launch environment understood, and is what is missing or odd in it named?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from ghostmask.engine.cores import quota
from ghostmask.engine.errors import InputError
from ghostmask.engine.launch import Launch, device_index, first_host, read_launch, tasks_on
from ghostmask.engine.world import claim_gpu

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "70", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "4", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
}  # fmt: skip


def test_torchruns_variables_are_the_launch() -> None:
    assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, "a", 29500, True)


def test_how_often_torchrun_starts_ranks_again_is_known() -> None:
    assert read_launch({**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3"}).restarts == 3


def test_tasks_of_srun_are_ranks_that_meet_at_the_first_node() -> None:
    launch = read_launch(SRUN)
    assert launch == Launch(4, 6, 1, 3, "node03", 20000 + 70 * 31 + 1)
    assert read_launch({**SRUN, "MASTER_ADDR": "b", "MASTER_PORT": "7"}).address == "b"
    assert read_launch({**SRUN, "SLURM_STEP_ID": "2"}).port != launch.port


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},  # left over from another job
        {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },  # an sbatch script's shell
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"},
    ],
)
def test_one_rank_is_alone(env: dict[str, str]) -> None:
    assert read_launch(env) == Launch()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": None}, "RANK"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE"),
        ({"RANK": "8"}, "RANK = '8'"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"RANK": ""}, "RANK = ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"WORLD_SIZE": "8.0"}, "WORLD_SIZE = '8.0'"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK = 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE = '9'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: not set"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR: not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT: not set"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT = '65536'"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_is_wrong_with_torchruns_variables_is_named(change: dict[str, str | None], named: str) -> None:
    env = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(InputError) as error:
        read_launch(env)
    assert str(error.value).startswith(named)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_an_odd_variable_of_slurm_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} = 'x'"):
        read_launch({**SRUN, name: "x"})


def test_mpiruns_ranks_do_not_train_alone() -> None:
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_SIZE"):
        read_launch({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("a,b", "a"), ("node[3-5,9],x1", "node3"), ("node[007-010]", "node007"), ("n[1,3]", "n1"),
        ("rack[2-3]n[01-04,09],other", "rack2n01"), ("node[1-2].net", "node1.net"),
    ],
)  # fmt: skip
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_each_node_in_slurms_short_form() -> None:
    assert [tasks_on("4(x2),3", node) for node in range(3)] == [4, 4, 3]
    assert tasks_on("", 0) == 1


def test_a_rank_that_sees_one_gpu_only_takes_it() -> None:
    assert [device_index(local, 1) for local in range(4)] == [0, 0, 0, 0]
    assert [device_index(local, 4) for local in range(4)] == [0, 1, 2, 3]


def test_ranks_that_share_a_gpu_are_refused_before_nccl_sees_them() -> None:
    store, launch = HashStore(), Launch(1, 2, 1, 2)
    claim_gpu(store, "GPU-1", launch)
    claim_gpu(store, "GPU-2", launch)
    with pytest.raises(InputError, match="ranks = 2: ranks on this machine share a GPU; start one per GPU"):
        claim_gpu(store, "GPU-2", launch)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_cpu_quota_counts_also_that_of_a_group_above(tmp_path: Path) -> None:
    write(tmp_path / "jobs" / "one", cpu__max="max 100000\n")
    assert quota("0::/jobs/one\n", tmp_path) == math.inf
    write(tmp_path / "jobs", cpu__max="150000 100000\n")
    assert quota("0::/jobs/one\n", tmp_path) == 1.5
    assert quota("0::/elsewhere\n", tmp_path) == math.inf


def test_a_cpu_quota_of_the_first_version_counts(tmp_path: Path) -> None:
    write(tmp_path / "cpu" / "docker", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    groups = "5:cpu,cpuacct:/docker\n4:memory:/docker\n0::/\n"
    assert quota(groups, tmp_path) == 2.0
    write(tmp_path / "cpu" / "docker", cpu__cfs_quota_us="-1\n")
    assert quota(groups, tmp_path) == math.inf


def test_a_containers_own_group_lies_at_the_root(tmp_path: Path) -> None:
    write(tmp_path, cpu__max="50000 100000\n")
    assert quota("0::/../other\n", tmp_path) == 0.5
