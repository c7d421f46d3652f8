"""Wrong input that only the data can show: one clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ghostmask.launcher.main import main
from ghostmask.launcher.settings import load_config, to_yaml
from ghostmask.models.build import build_model

Train = Callable[..., str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    assert main(["prepare", "digits_probmask", f"data.root={root}"]) == 0
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared data that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Train:
    """Calls train with settings that it must refuse, and hands back its one line."""

    def call(root: Path, *settings: str) -> str:
        run = tmp_path / "run"
        code = main(["train", "digits_probmask", f"data.root={root}", f"run={run}", *settings])
        said = capfd.readouterr().err.strip().splitlines()
        lines = [line for line in said if not line.endswith(" so far")]  # on a busy machine
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("ghostmask: error: ")
        assert not run.exists(), "a refused run left something behind"
        return lines[0]

    return call


def test_beton_files_that_were_never_written_name_the_command_that_writes_them(refused: Train, tmp_path: Path) -> None:
    assert "ghostmask prepare" in refused(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage"])
def test_a_damaged_beton_is_named(damage: str, root: Path, refused: Train) -> None:
    (file,) = root.glob("**/*train*.beton")
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "garbage": content[::-1]}[damage])
    assert file.name in refused(root)


def test_a_class_count_that_does_not_match_the_data_is_named(root: Path, refused: Train) -> None:
    line = refused(root, "model.num_classes=7")
    assert "model.num_classes" in line
    assert "10" in line


def test_ranks_that_cannot_meet_do_not_train_alone(root: Path, refused: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert "MASTER_ADDR and MASTER_PORT: not set" in refused(root)


def test_a_batch_larger_than_the_training_set_is_named(root: Path, refused: Train) -> None:
    assert "data.batch_size" in refused(root, "data.batch_size=5000")


def test_a_network_that_is_too_deep_for_the_images_is_named(root: Path, refused: Train) -> None:
    assert "vgg19" in refused(root, "model.name=vgg19")


def test_a_network_of_torchvision_that_cannot_take_the_images_is_named(root: Path, refused: Train) -> None:
    assert "model.name = 'alexnet': cannot take the dataset's images of 3 x 8 x 8" in refused(
        root, "model.name=alexnet"
    )


def test_what_an_own_network_does_wrong_is_said_before_a_run_is_made(
    root: Path, refused: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "net_of_mine.py").write_text("def build(num_classes):\n    raise ValueError('no\\nluck')\n")
    line = refused(root, "model.name=net_of_mine:build")
    assert line.endswith(f"it raises ValueError: no ({tmp_path}/net_of_mine.py, line 2)")
    assert "did you mean 'build'?" in refused(root, "model.name=net_of_mine:buidl")


def test_a_starting_network_that_is_not_there_is_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = root / "run"
    settings = ["mask.method=magnitude", "mask.path=nowhere.pt", f"run={run}", f"data.root={root}"]
    assert main(["train", "digits_magnitude", *settings]) == 2
    assert "mask.path" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_is_refused_where_there_is_none(root: Path, refused: Train) -> None:
    assert "train.device" in refused(root, "train.device=cuda")


def test_a_run_is_evaluated_although_nobody_would_train_it_so_any_more_and_a_damaged_result_is_named(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config("digits_probmask", [f"data.root={root}", "train.epochs=1", "data.batch_size=7", "run=r"])
    run, file = tmp_path / "r", tmp_path / "r" / "export" / "model.safetensors"
    file.parent.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    state = build_model(config.model, 10, (3, 8, 8), 0).state_dict()
    save_file(state, file)
    assert main(["evaluate", str(run)]) == 0
    last = next(reversed(state))
    for damaged, said in {
        "nan": f"{last} holds nan; the file is damaged",
        "other": "does not hold this network's weights",
        "torn": "cannot be read",
        "empty": "is empty",
    }.items():
        values = torch.full_like(state[last], torch.nan) if damaged == "nan" else torch.zeros(3, 3)
        save_file({**state, last: values}, file)
        if damaged in ("torn", "empty"):
            file.write_bytes(file.read_bytes()[: 2000 if damaged == "torn" else 0])
        capfd.readouterr()
        assert main(["evaluate", str(run)]) == 2
        line = capfd.readouterr().err.strip()
        assert line.startswith(f"ghostmask: error: RUN = '{file}': ")
        assert said in line
        assert len(line.splitlines()) == 1
