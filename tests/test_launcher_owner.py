"""Is a run's folder its own, known again, and left alone by who only reads; and does a run go on only as it was?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from image_runs import Runs
from test_engine_lease import await_stop

from ghostmask.engine.errors import EXIT_NOT_OWNER, EXIT_NOT_SAVED
from ghostmask.launcher.main import main

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A finished run with its checkpoints of steps 2, 4 and 6; not to be changed."""
    runs = Runs(tmp_path_factory.mktemp("finished"))
    runs.pictures(0, 8)
    runs.prepare()
    assert runs.call("train") == 0
    return runs


@pytest.fixture
def runs(finished: Runs, tmp_path: Path) -> Runs:
    """A copy of it."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    return Runs(tmp_path / "copy")


def content(folder: Path) -> dict[str, Any]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def steps(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def last_words(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().rpartition("\n")[2]


def test_a_stopped_run_is_taken_over_and_its_first_process_writes_nothing_when_it_comes_back(
    finished: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    runs.images = finished.images
    long = ("train.epochs=400", "checkpoint.takeover_s=1.5", "checkpoint.every_steps=1", "train.eval_every=1000")
    command = [sys.executable, "-m", "ghostmask", *runs.arguments("train", "run", *long)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    started = [first]
    try:
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            assert first.poll() is None
            time.sleep(0.1)
        assert runs.call("train", "run", *long) == 2
        owned = f"error: run = '{tmp_path / 'run'}': process {first.pid} on "
        assert owned in last_words(capsys)
        assert main([*runs.arguments("train", "run", *long), "--restart"]) == 2
        assert owned in last_words(capsys)
        assert any((tmp_path / "run" / "checkpoints").glob("step-*")), "--restart removed a live run's files"
        first.send_signal(signal.SIGSTOP)
        await_stop(first.pid)
        before = content(tmp_path / "run")
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "look")]) == 0
        assert (tmp_path / "look" / "model.safetensors").is_file()
        assert content(tmp_path / "run") == before, "a look at a live run changed it"
        second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(second)
        position = max(steps(tmp_path / "run"))
        while max(steps(tmp_path / "run"), default=0) < position + 3:
            assert second.poll() is None
            time.sleep(0.1)
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=60) == 75
        before = content(tmp_path / "run")
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=60) == EXIT_NOT_OWNER
        assert first.stderr is not None
        assert "nothing more was written" in first.stderr.read().strip().rpartition("\n")[2]
        assert content(tmp_path / "run") == before, "who lost the folder wrote to it"
        found = steps(tmp_path / "run")
        assert found == list(range(1, len(found) + 1))
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize("command", ["evaluate", "export", "hessian"])
def test_who_reads_a_run_changes_nothing_of_it(command: str, runs: Runs, tmp_path: Path) -> None:
    before = content(runs.folder)
    out = [] if command == "evaluate" else ["--out", str(tmp_path / "out")]
    out += ["--top", "1", "--batches", "1"] if command == "hessian" else []
    assert main([command, str(runs.folder / "run"), *out]) == 0
    assert content(runs.folder) == before
    assert command == "evaluate" or any((tmp_path / "out").iterdir())


def test_a_read_only_folder_is_read(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs.folder / "run")
    remount = [["mount", "--bind", run, run], ["mount", "-o", "remount,ro,bind", run]]
    if os.geteuid() != 0 or any(subprocess.run(c, capture_output=True, check=False).returncode for c in remount):
        pytest.skip("mounting needs root")
    try:
        assert main(["evaluate", run]) == 0
        assert main(["export", run, "--out", str(tmp_path / "out")]) == 0
        assert main(["hessian", run, "--out", str(tmp_path / "out"), "--top", "1", "--batches", "1"]) == 0
        capsys.readouterr()
        assert main(["export", run]) == 2
        assert f"--out = '{run}/export': nothing can be written to {run}/export (Read-only" in last_words(capsys)
        assert runs.call("train") == 2
    finally:
        subprocess.run(["umount", "-l", run], check=True)


def test_a_checkpoint_that_goes_while_it_is_read_is_followed_by_the_next(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a live run retires it: the newest is moved on under a higher number after it was chosen."""
    from ghostmask.launcher import export_run

    build, checkpoints = export_run.build_method, runs.folder / "run" / "checkpoints"
    gone: list[str] = []

    def retire(*arguments: Any) -> Any:
        if not gone:
            gone.append("step-00000006")
            shutil.rmtree(checkpoints / "step-00000006")
        return build(*arguments)

    monkeypatch.setattr(export_run, "build_method", retire)
    assert main(["export", str(runs.folder / "run")]) == 0
    assert gone
    assert "the run is not finished: phase train, step 4 of 6" in capsys.readouterr().err


def test_a_configuration_that_was_deleted_is_written_again_and_one_that_was_changed_is_refused(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs.folder / "run" / "config.yaml"
    text, stamp = file.read_text(), file.stat().st_mtime_ns
    assert runs.call("train") == 0
    assert (file.read_text(), file.stat().st_mtime_ns) == (text, stamp), "a resume writes no configuration"
    capsys.readouterr()
    file.unlink()
    assert runs.call("train") == 0
    before, after = yaml.safe_load(text), yaml.safe_load(file.read_text())
    assert before["data"].pop("root") != after["data"].pop("root"), "of a copy"
    assert before | {"run": after["run"]} == after
    assert "config.yaml was not there; it is written again, from step-00000006" in capsys.readouterr().err
    file.write_text(text.replace("seed: 3", "seed: 4"))
    assert runs.call("train", "run", "seed=4") == 2
    assert "step-00000006 was made with another configuration than config.yaml says now (seed: 3" in last_words(capsys)
    assert main(["export", str(runs.folder / "run")]) == 2
    assert "seed: 3" in last_words(capsys)
    file.unlink()
    assert runs.call("train", "run", "seed=4") == 2
    assert "holds another configuration (seed: 3 in the run folder, 4 given)" in last_words(capsys)


def test_a_checkpoint_under_another_name_or_of_another_run_is_not_believed(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = runs.folder / "run" / "checkpoints"
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000008")
    assert runs.call("train") == 0
    err = capsys.readouterr().err
    assert "step-00000008 is damaged (it is the checkpoint of step 2, under another's name); using the one" in err
    assert runs.call("train", "other", "seed=5") == 0
    shutil.copytree(runs.folder / "other" / "checkpoints" / "step-00000006", checkpoints / "step-00000006.1")
    capsys.readouterr()
    assert runs.call("train") == 0
    assert "step-00000006.1 is damaged (it is a checkpoint of another run, " in capsys.readouterr().err


def test_data_that_changed_are_refused_unless_they_are_accepted(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(runs.images, runs.folder / "moved")
    moved = f"data.root={runs.folder / 'moved'}"
    assert runs.call("train", "run", moved) == 0, "the root may change"
    runs.images = runs.folder / "moved"
    (runs.images / "train" / "class0" / "0.png").write_bytes((runs.images / "train/class1/0.png").read_bytes())
    runs.prepare()
    before = content(runs.folder / "run")
    assert runs.call("train") == 2
    said = last_words(capsys)
    assert "its data changed since step-00000006 (training content: " in said
    assert said.endswith("or give --new-data to go on with what is there now")
    assert {k: v for k, v in content(runs.folder / "run").items() if ".lease" not in k} == {
        k: v for k, v in before.items() if ".lease" not in k
    }
    file = runs.folder / "run" / "config.yaml"
    file.write_text(re.sub(r"root: .*", f"root: {runs.images}", file.read_text()))
    assert main(["export", str(runs.folder / "run")]) == 0
    assert "warning: the data changed since step-00000006 (training content: " in capsys.readouterr().err
    assert main([*runs.arguments("train"), "--new-data"]) == 0
    assert "going on at step 6 with what is there now, as --new-data says" in capsys.readouterr().err
    runs.pictures(8, 8)
    runs.prepare()
    assert main([*runs.arguments("train"), "--new-data"]) == 2
    said = last_words(capsys)
    assert "training images: 16 before, 32 now" in said
    assert "its epochs would be other ones" in said


def test_a_new_run_starts_from_a_checkpoint_of_another_and_says_so(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs.folder / "run")
    new = [*runs.arguments("train", "new", "optim.lr=0.001", "seed=4"), "--from", f"{run}@2"]
    assert main(new) == 0
    err = capsys.readouterr().err
    assert f"a new run, from {run}/checkpoints/step-00000002 at step 2, phase train (" in err
    assert "optim.lr: 0.01 in the run folder, 0.001 given" in err
    assert json.loads((runs.folder / "new" / "run.json").read_text())["started_from"] == f"{run}@2"
    assert steps(runs.folder / "new") == [3, 4, 5, 6]
    assert main(new) == 0, "the same command again goes on with it"
    assert main(new[:-2]) == 0, "and without --from"
    assert main([*new[:-1], f"{run}@4"]) == 2
    assert f"was started {run}@2; leave --from out to go on with it" in last_words(capsys)
    assert main([*runs.arguments("train", "newer"), "--from", f"{run}@3"]) == 2
    assert "no intact checkpoint of that step; there are: 2, 4, 6" in last_words(capsys)
    assert main([*runs.arguments("train"), "--from", run]) == 2
    assert "is the run itself" in last_words(capsys)
    assert main([*runs.arguments("train", "newest", "data.batch_size=4"), "--from", run]) == 2
    assert "has 2 steps per epoch, this run 4" in last_words(capsys)
    assert main([*runs.arguments("train", "newest", "mask.method=random", "finetune.epochs=0"), "--from", run]) == 2
    assert "step 6 of phase finetune does not exist in this run (train: steps 0 to 4)" in last_words(capsys)


def test_restart_removes_what_the_run_wrote_and_nothing_else(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.folder / "run"
    mine = [run / "notes.txt", run / "export" / "mine.onnx", run / "checkpoints" / "kept" / "file", run / "mine" / "a"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    identity = json.loads((run / "run.json").read_text())["run"]
    assert main([*runs.arguments("train"), "--restart"]) == 0
    assert "--restart left what no run wrote: checkpoints, export, mine, notes.txt" in capsys.readouterr().err
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert json.loads((run / "run.json").read_text())["run"] != identity
    assert steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("flags", [[], ["--restart"]])
def test_a_folder_that_no_run_made_is_left_alone(
    flags: list[str], finished: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("seed: 7\n")
    runs = Runs(tmp_path)
    runs.images = finished.images
    before = content(tmp_path / "mine")
    assert main([*runs.arguments("train", "mine"), *flags]) == 2
    assert "holds config.yaml, and no run.json that would show that a run wrote them; nothing was touched" in (
        last_words(capsys)
    )
    assert content(tmp_path / "mine") == before


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def empty_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [Path.touch, empty_folder, os.mkfifo, dangling, endless])
def test_whatever_lies_under_a_name_of_the_checkpoints_gets_an_answer(
    kind: Callable[[Path], None], runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = runs.folder / "run" / "checkpoints"
    for name in ("latest", "step-00000009", "step-00000006/manifest.json", "step-00000004/meta.json"):
        path = checkpoints / name
        path.unlink(missing_ok=True)
        kind(path)
    assert runs.call("train") == 0
    err = capsys.readouterr().err
    for name in ("step-00000009", "step-00000006", "step-00000004"):
        assert f"checkpoint {checkpoints / name} is damaged" in err
    assert f"resuming {runs.folder / 'run'} at step 2" in err
    assert steps(runs.folder / "run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", [Path.touch, os.mkfifo, dangling])
def test_checkpoints_that_are_no_folder_are_an_error_and_not_a_new_run(
    kind: Callable[[Path], None], runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(runs.folder / "run" / "checkpoints")
    kind(runs.folder / "run" / "checkpoints")
    before = (runs.folder / "run" / "metrics.jsonl").read_bytes()
    assert runs.call("train") == 2
    assert f"{runs.folder / 'run' / 'checkpoints'}" in last_words(capsys)
    assert (runs.folder / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_whose_checkpoints_the_disk_did_not_take_ends_with_a_code_of_its_own(
    finished: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ghostmask.engine.checkpoint.store.begin", full)
    runs = Runs(tmp_path)
    runs.images = finished.images
    assert runs.call("train") == EXIT_NOT_SAVED
    out = capsys.readouterr()
    assert "the last 3 saves FAILED: the network is exported, but" in out.err.strip().rpartition("\n")[2]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_the_resolved_configuration_data_and_versions_are_under_a_checkpoints_seal(finished: Runs) -> None:
    run = finished.folder / "run"
    meta = json.loads((run / "checkpoints" / "step-00000006" / "meta.json").read_text())
    manifest = json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert "meta.json" in manifest["files"]
    assert meta["step"] == 6
    assert meta["run"] == json.loads((run / "run.json").read_text())["run"]
    assert meta["config"]["optim"]["lr"] == yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 0.01
    assert meta["versions"].keys() == {"ghostmask", "torch", "torchvision", "deepspeed", "ffcv", "numpy"}
    content = json.loads((next((finished.images / "beton").glob("*-train.json"))).read_text())["content"]
    assert meta["data"] == {
        "training images": 16, "evaluation images": 16, "classes": 2, "batch size": 8, "steps per epoch": 2,
        "training content": content, "evaluation content": meta["data"]["evaluation content"],
    }  # fmt: skip


def test_an_export_that_the_disk_does_not_take_is_tried_again_and_then_has_a_code_of_its_own(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghostmask.launcher import train

    write, waits, enough = train.write_export, [], 2
    monkeypatch.setattr(train.time, "sleep", waits.append)

    def full(*arguments: Any, **details: Any) -> Any:
        if len(waits) < enough:
            raise OSError(28, "No space left on device")
        return write(*arguments, **details)

    monkeypatch.setattr(train, "write_export", full)
    assert runs.call("train") == 0
    assert waits == [1.0, 2.0]
    assert "export cannot be written (No space left on device); trying again in 2 s" in capsys.readouterr().err
    enough = 99
    assert runs.call("train") == EXIT_NOT_SAVED
    assert "what is trained is in the checkpoints: free the disk" in last_words(capsys)
