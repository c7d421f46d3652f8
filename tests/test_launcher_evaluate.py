"""Is a network evaluated on other images where somebody says so, is that said, and is each class counted right?"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostmask.engine import waiting
from ghostmask.engine.data import Batch
from ghostmask.engine.errors import InputError
from ghostmask.engine.evaluation import Score, score
from ghostmask.engine.world import single
from ghostmask.launcher import evaluate
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.evaluate import check_classes
from ghostmask.launcher.export import use, write_export
from ghostmask.launcher.settings import load_config, to_dict, to_yaml
from ghostmask.models.build import build_model

OTHER = ["data.dataset=synthetic", "data.image_size=8", "data.num_train=64", "data.num_eval=33"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits with its export, and images of another data set beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    for data in ([], OTHER):
        assert run_command(["prepare", "digits_methods", *data, f"data.root={folder}"]) == 0
    config = load_config("digits_methods", ["mask.method=dense", "mask.density=1", "finetune.epochs=0",
                                            f"data.root={folder}"])  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(to_yaml(config))
    net = build_model(config.model, 10, (3, 8, 8), 0)
    write_export(folder / "run" / "export", net, {}, accuracy=0.1, image_shape=(3, 8, 8), config=to_dict(config),
                 usage=use(config))  # fmt: skip
    return folder / "run"


def test_other_data_are_evaluated_where_they_are_asked_for_and_that_is_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["evaluate", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    own = json.loads(out)
    assert (own["num_images"], own["config"]["data"]["dataset"]) == (359, "digits")
    assert "other data" not in err
    assert run_command(["evaluate", str(run), *OTHER, "--json", "--per-class", "-"]) == 0
    out, err = capsys.readouterr()
    other = json.loads(out)
    assert (other["num_images"], other["config"]["data"]["dataset"]) == (33, "synthetic")
    assert "ghostmask: measured on other data than the run's (data.dataset: digits in the run " in err
    assert sum(row["images"] for row in other["per_class"]) == 33
    right = sum(row["images"] * row["accuracy"] for row in other["per_class"])
    assert right == pytest.approx(33 * other["accuracy"])


def test_accuracy_per_class_is_a_file_or_a_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", str(run), "--per-class", str(tmp_path / "classes.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert (len(rows), sum(int(row["images"]) for row in rows)) == (10, 359)
    assert list(rows[0]) == ["class", "images", "accuracy", "top5"]
    capsys.readouterr()
    assert run_command(["evaluate", str(run), "--per-class", "-"]) == 0
    head, _, *shown = capsys.readouterr().out.splitlines()[-12:]
    assert head == "| class | images | accuracy | top5 |"
    assert [line.split("|")[3].strip() for line in shown] == [f"{float(row['accuracy']):.2%}" for row in rows]


def test_an_evaluation_that_takes_long_says_of_what(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "QUIET_S", 0.05)
    said: list[str] = []
    monkeypatch.setattr(waiting, "speak", said.append)

    def unhurried(*arguments: Any, **options: Any) -> Score:
        deadline = time.monotonic() + 60
        while not any("model.safetensors: " in line for line in said) and time.monotonic() < deadline:
            time.sleep(0.01)
        return score(*arguments, **options)

    monkeypatch.setattr(evaluate, "score", unhurried)
    assert run_command(["evaluate", str(run)]) == 0
    assert any(line.startswith(f"ghostmask: evaluation of {run / 'export' / 'model.safetensors'}: ") for line in said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("optim.lr=1", "optim.lr=1: is not read by evaluate; give settings of data"),
        ("data.num_eval=5", "data.num_eval = 5: is not read with data.dataset=digits"),
        ("data.root=nowhere", "data.root = 'nowhere': "),
    ],
)
def test_settings_of_anything_else_are_refused(settings: str, said: str, run: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_command(["evaluate", str(run), settings])
    assert str(caught.value).startswith(said)


def test_data_of_other_classes_are_refused() -> None:
    check_classes("x", ["cat", "dog"], ["cat", "dog"])
    check_classes("x", [], ["cat", "dog"])
    with pytest.raises(
        InputError, match=r"^data\.root = 'x': it has 2 classes, the run 2, and they differ \('cat' and 'a"
    ):
        check_classes("x", ["cat", "dog"], ["ant", "dog"])
    with pytest.raises(InputError, match="it has 1 classes, the run 2"):
        check_classes("x", ["cat", "dog"], ["cat"])


def test_each_class_is_counted_as_a_plain_loop_counts_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 9, generator=generator)
    labels = torch.randint(9, (50,), generator=generator)
    batches = [Batch(logits[:30], labels[:30]), Batch(logits[30:], labels[30:])]
    found = score(torch.nn.Identity(), batches, single(), num_classes=9)
    expected = torch.zeros(9, 3, dtype=torch.int64)
    for row, label in zip(logits, labels.tolist(), strict=True):
        best = row.argsort(descending=True).tolist()
        expected[label] += torch.tensor([best[0] == label, label in best[:5], 1])
    assert found.per_class is not None
    assert found.per_class.equal(expected)
    assert found.accuracy == expected[:, 0].sum() / 50
