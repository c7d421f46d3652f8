"""May a command go on with a run: other settings, other numbers of ranks, an older version's folder?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_data import MemoryData

from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.errors import InputError
from ghostmask.engine.world import single
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import read_run, resumed
from ghostmask.launcher.main import main
from ghostmask.launcher.open_run import open_owned
from ghostmask.launcher.record import new_record, write_record
from ghostmask.launcher.settings import from_dict, load_config, to_yaml
from ghostmask.launcher.train import train

OLD = """\
run: digits_probmask
data:
  dataset: digits
  batch_size: 64
mask:
  method: probmask
  density: 0.05
  path: ""
  lr: 0.06
  samples: 2
  noise: per_rank
  gradient_bf16: false
  update_every: 100
train:
  epochs: 20
  precision: fp32
  accumulation: 1
"""
"""What version 0.1.0 wrote into a run folder in November 2026, cut short."""


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """The configuration of a run that has a checkpoint and was cut into 8 parts."""
    config = load_config("digits_probmask", [f"run={tmp_path}/run", "train.replicas=8"])
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    return config


@pytest.fixture(autouse=True)
def only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def with_parts(config: RunConfig, replicas: int) -> RunConfig:
    return replace(config, train=replace(config.train, replicas=replicas))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def test_a_run_keeps_the_parts_that_its_batch_is_cut_into_unless_others_are_asked_for(run: RunConfig) -> None:
    assert resumed(with_parts(run, 0)) == resumed(run) == run
    with pytest.raises(InputError, match=r"\(train\.replicas: 8 in the run folder, 4 given\); give another run=NAME"):
        resumed(with_parts(run, 4))
    assert resumed(with_parts(run, 0), restart=True).train.replicas == 0
    (Path(run.run) / "checkpoints" / "step-00000001").rmdir()
    assert resumed(with_parts(run, 4)).train.replicas == 4, "nothing of the run was kept"


@pytest.mark.parametrize("command", ["train", "find-mask", "export", "hessian"])
def test_ranks_that_cannot_go_on_with_a_run_are_told_which_can_before_they_meet(
    command: str, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "3"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "a"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    before = content(Path(run.run))
    arguments = [run.run]
    if command == "train":
        arguments = ["digits_probmask", f"run={run.run}"]
    elif command == "find-mask":
        arguments = ["digits_magnitude", "mask.method=snip", "train.replicas=8", "finetune.epochs=0"]
    with pytest.raises(InputError, match=r"^ranks = 3: do not fit train\.replicas = 8; start 1, 2, 4, 8 ranks$"):
        run_command([command, *arguments])
    assert content(Path(run.run)) == before
    if command == "train":  # as a function too, without the command line's checks
        with pytest.raises(InputError, match="ranks = 3: do not fit"):
            train(with_parts(run, 0))


@pytest.mark.parametrize("command", ["train", "export", "evaluate", "hessian"])
def test_a_run_of_an_older_version_is_left_alone_and_named_in_one_line(
    command: str, run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(run.run)
    (folder / "config.yaml").write_text(OLD)
    before = content(folder)
    assert main([command, *(["digits_probmask", f"run={folder}"] if command == "train" else [str(folder)])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"ghostmask: error: run = '{folder}': was made by an older version of ghostmask (train.accumulation in its "
        "config.yaml), whose checkpoints this one does not read; give another run=NAME, or move the "
        "folder away\n"
    )
    assert content(folder) == before
    assert resumed(run, restart=True) == run


@pytest.mark.parametrize(
    "setting", ["mask: {noise: shared}", "train: {accumulation: 2}", "mask: {gradient_bf16: true}"]
)
def test_an_older_version_is_known_by_any_of_its_settings(setting: str, run: RunConfig) -> None:
    (Path(run.run) / "config.yaml").write_text(f"{setting}\n")
    with pytest.raises(InputError, match="made by an older version") as caught:
        read_run(Path(run.run))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["mask: {densty: 1}\n", "mask: [\n", "- a\n", "seed: {a: 1}\n"])
def test_a_configuration_that_cannot_be_read_is_not_called_old(text: str, run: RunConfig) -> None:
    (Path(run.run) / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="its configuration cannot be read") as caught:
        resumed(run)
    assert "\n" not in str(caught.value)
    assert "older" not in str(caught.value)


def test_checkpoints_of_an_older_version_change_nothing_in_their_folder(tmp_path: Path) -> None:
    config = from_dict({"run": str(tmp_path), "train": {"replicas": 1}})
    write_record(tmp_path, new_record())
    store = CheckpointStore(tmp_path / "checkpoints", single())
    store.save(4, {"weight": torch.zeros(3)}, {"phase": "search", "updates": {"weight": 4}})
    store.close()
    manifest = tmp_path / "checkpoints" / "step-00000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    before = {name: data for name, data in content(tmp_path).items() if ".lease" not in name}
    with pytest.raises(InputError, match=r"it was written by an older version of ghostmask") as caught:
        open_owned(tmp_path, config, single(), MemoryData(single()))
    assert "\n" not in str(caught.value)
    assert {name: data for name, data in content(tmp_path).items() if ".lease" not in name} == before
    opened = open_owned(tmp_path, config, single(), MemoryData(single()), restart=True)
    opened.store.close()
    opened.release()
    assert opened.saved is None
    assert load_config(str(tmp_path / "config.yaml")) == config
