"""ghostmask doctor: what is wrong is found before the run, on the rank where it is, and told with its fix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import ghostmask
from ghostmask.engine.data import PartBatch
from ghostmask.engine.errors import InputError
from ghostmask.engine.launch import Launch
from ghostmask.engine.mixing import Mixing
from ghostmask.engine.spawn import free_port, run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World, single
from ghostmask.launcher.doctor import disk, machine, reach, speed
from ghostmask.launcher.doctor.finding import Finding, failed, passed, warned, worst
from ghostmask.launcher.doctor.patient import Patient
from ghostmask.launcher.doctor.run import scratch_beside
from ghostmask.launcher.main import main
from ghostmask.launcher.run import Shares
from ghostmask.launcher.settings import load_config

ALL = [
    "ranks", "clocks", "software", "code", "settings", "devices", "folder", "data", "same data", "network", "step",
    "loader", "disk", "checkpoint", "estimate",
]  # fmt: skip
SMALL = ["train.threads=1", "data.num_workers=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert main(["prepare", "digits_probmask", f"data.root={folder}"]) == 0
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LOADER_S", 0.2)
    monkeypatch.setattr(speed, "STEPS", 1)


def lines(text: str) -> dict[str, tuple[str, str]]:
    """name of a check -> (level, what it says)."""
    rows = [line for line in text.splitlines() if line[:4] in ("pass", "warn", "fail", "skip")]
    return {row[6:16].strip(): (row[:4], row[18:]) for row in rows}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("config", ["digits_probmask", "digits_tost", "digits_magnitude"])
def test_a_run_that_would_work_passes_every_check_and_leaves_nothing(
    config: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.rglob("*"))
    assert main(["doctor", config, f"data.root={root}", f"run={tmp_path / 'run'}", *SMALL]) == 0
    found = lines(capsys.readouterr().out)
    assert list(found) == ALL
    assert {level for level, _ in found.values()} <= {"pass", "warn"}, found
    assert "1,438 + 359 images" in found["data"][1]
    assert "hours" in found["estimate"][1]
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["absent", "damaged"])
def test_data_that_are_not_there_or_not_whole_fail_and_what_needs_them_is_skipped(
    damage: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path / "data")
    file = tmp_path / "data" / "beton" / "digits-train.beton"
    if damage == "absent":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    run = f"run={tmp_path / 'run'}"
    assert main(["doctor", "digits_probmask", f"data.root={tmp_path / 'data'}", run, *SMALL]) == 2
    found = lines(capsys.readouterr().out)
    assert found["data"][0] == "fail"
    assert "ghostmask prepare" in found["data"][1]
    assert {found[name][0] for name in ALL[ALL.index("same data") :]} == {"skip"}


@pytest.mark.usefixtures("quick")
def test_what_the_recipe_needs_is_looked_at_as_training_does_and_is_part_of_the_step(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["doctor", "digits_tost", f"data.root={root}", f"run={tmp_path / 'run'}", *SMALL]
    assert main([*given, f"distill.path={tmp_path / 'teacher.safetensors'}"]) == 2
    level, said = lines(capsys.readouterr().out)["network"]
    assert (level, "distill.path" in said, "is missing" in said) == ("fail", True, True)
    steps: list[int] = []

    def seen(self: Mixing, trainer: Trainer, number: int, part: PartBatch) -> PartBatch:
        steps.append(trainer.position.step)
        return part

    monkeypatch.setattr(Mixing, "on_part", seen)
    assert main([*given, "augment.mixup=0.2"]) == 0
    assert 0 in steps


def test_a_live_run_s_folder_is_left_alone_and_one_that_no_run_wrote_is_in_the_way(tmp_path: Path) -> None:
    run, link = tmp_path / "disk" / "run", tmp_path / "link"
    run.mkdir(parents=True)
    link.symlink_to(run)
    assert {scratch_beside(place).parent for place in (run, link, run.parent / "new" / "run")} == {tmp_path / "disk"}
    assert list(run.iterdir()) == []
    (run / "config.yaml").write_text("seed: 1\n")
    config = load_config("digits_probmask", [f"run={run}", "train.replicas=1"])
    patient = Patient(config, Launch(), single(), tmp_path, tmp_path, Shares.of(config, single()))
    with pytest.raises(InputError, match="nothing was touched"):
        disk.folder(patient)


@pytest.mark.usefixtures("quick")
def test_a_disk_too_small_for_the_checkpoints_fails_before_one_is_written(
    root: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "digits_probmask", f"data.root={root}", f"run={small_disk / 'run'}", *SMALL]) == 2
    found = lines(capsys.readouterr().out)
    assert found["disk"][0] == "fail"
    assert "checkpoint.keep=1" in found["disk"][1]
    assert found["checkpoint"][0] == "skip"
    assert list(small_disk.iterdir()) == []


def test_a_loss_that_is_not_finite_is_found_by_the_real_step(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.root={root}", f"run={tmp_path / 'run'}", "optim.lr=1e9", "optim.clip=0", *SMALL]
    assert main(["doctor", "digits_magnitude", *given]) == 2
    found = lines(capsys.readouterr().out)
    assert found["step"][0] == "fail"
    assert "not finite" in found["step"][1]


def test_another_version_of_the_code_on_one_of_two_ranks_is_named_with_its_files(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(
        Path(ghostmask.__file__).parent, copy / "ghostmask", ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    with (copy / "ghostmask" / "engine" / "trainer.py").open("a") as file:
        file.write("# edited on this node only\n")
    command = ["doctor", "digits_probmask", f"data.root={root}", f"run={tmp_path / 'run'}", *SMALL]
    port, processes = free_port(), []
    for rank, place in enumerate((None, copy)):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if place:
            env["PYTHONPATH"] = str(place)
        start = [sys.executable, "-m", "ghostmask", *command]
        processes.append(subprocess.Popen(start, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    found = lines(said[0])
    assert found["code"][0] == "fail"
    assert "rank 1" in found["code"][1]
    assert "engine/trainer.py" in found["code"][1]
    assert found["step"] == ("skip", "needs code")


def test_a_rank_that_does_not_start_is_named(root: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from ghostmask.launcher.doctor import reach; from ghostmask.launcher.main import main; "
        "reach.MEET_S = 2.0; sys.exit(main(sys.argv[1:]))"
    )
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [
        sys.executable,
        "-c",
        script,
        "doctor",
        "digits_probmask",
        f"data.root={root}",
        f"run={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "rank 1 did not start within 2 s" in done.stderr


def silent_rank(world: World) -> str:
    """Rank 1 comes to the all-reduce only after rank 0 has given it up."""
    store = dist.distributed_c10d._get_default_store()
    if world.rank == 1:
        time.sleep(2.0)
    try:
        reach.answer(world, store, limit_s=0.5 if world.rank == 0 else 20.0)
    except InputError as error:
        return str(error)
    return ""


def test_a_rank_that_does_not_answer_is_named() -> None:
    said = run_distributed(silent_rank, 2)
    assert "rank 1 did not answer within 0.5 s" in said[0]


def test_an_all_reduce_that_all_came_to_is_the_network_s_fault() -> None:
    assert "NCCL_SOCKET_IFNAME" in reach.silence([], None, 20.0)


def test_a_clock_that_is_off_is_told_by_the_rank_that_has_it() -> None:
    times = [1000.0, 1000.2, 1090.0]
    found = [reach.skew(times, rank) for rank in range(3)]
    assert [finding.level for finding in found] == ["pass", "pass", "warn"]
    assert "89.8 s ahead" in found[2].text


def test_ranks_that_share_a_gpu_find_each_other() -> None:
    assert machine.sharers(["a", "b", "a"], 2) == "0"
    assert machine.sharers(["a", "b", "a"], 1) == ""


def test_a_gpu_that_torch_does_not_see_fails_unless_the_cpu_was_asked_for() -> None:
    assert machine.processors("auto", [Path("/dev/nvidia0")]).level == "fail"
    assert machine.processors("cpu", [Path("/dev/nvidia0")]).level == "pass"
    assert machine.processors("auto", []).level == "pass"


def test_other_settings_or_versions_are_named_with_both_values() -> None:
    assert machine.differences({"torch": "2.11.0", "numpy": "2"}, {"torch": "2.15.0", "numpy": "2"}) == (
        "torch 2.11.0 (rank 0: 2.15.0)"
    )
    assert machine.differences({}, {}) == ""


def test_a_run_folder_that_a_node_does_not_see_fails_there(tmp_path: Path) -> None:
    nowhere = tmp_path / "on_rank_0_only"
    config = load_config("digits_probmask", [f"run={tmp_path / 'run'}", "train.replicas=1"])
    patient = Patient(config, Launch(), single(), tmp_path, nowhere, Shares.of(config, single()))
    assert disk.folder(patient).level == "fail"
    nowhere.mkdir()
    assert disk.folder(patient).level == "pass"


def test_what_is_too_slow_too_large_or_too_full_is_said() -> None:
    assert speed.enough(99, 100, 2).level == "warn"
    assert speed.enough(101, 100, 2).level == "pass"
    assert speed.memory("", 91, 100).level == "warn"
    assert speed.memory("", 89, 100).level == "pass"
    assert disk.room(100, 99, "", Path()).level == "fail"
    assert disk.room(99, 100, "", Path()).level == "pass"


def test_the_worst_finding_of_all_ranks_is_the_one_that_is_printed() -> None:
    def whom(ranks: list[int]) -> str:
        return "" if len(ranks) == 3 else f"ranks {ranks}"

    assert worst([passed("a"), warned("b", "c"), failed("d", "e")], whom) == Finding("fail", "ranks [2]: d", "e")
    assert worst([passed("a")] * 3, whom) == passed("a")
    assert worst([failed("d")] * 3, whom) == failed("d")
    assert failed("d", "e").line("data") == "fail  data        d: e"
