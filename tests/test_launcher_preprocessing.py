"""Does an exported network with its summary.json give anybody the accuracy that ghostmask says, to the last image?"""

from __future__ import annotations

import json
from pathlib import Path

import odd_images
import pytest
import torch
from image_runs import Runs
from PIL import Image
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.open import open_dataset
from ghostmask.engine.data import Parts
from ghostmask.engine.world import single
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A trained network, on photographs of many kinds and sizes."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.pictures(0, 8)
    for split in ("train", "val"):
        for label in range(2):
            odd_images.good(runs.images / split / f"class{label}")
    settings = ["model.name=resnet20", "data.eval_size=24", "data.eval_resize=30", "data.interpolation=bicubic"]
    assert runs.call("prepare", "run", *settings) == 0
    assert runs.call("train", "run", *settings) == 0
    return runs


def test_a_few_lines_with_torchvision_give_the_same_logits_and_accuracy(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    export = runs.folder / "run" / "export"
    summary = json.loads((export / "summary.json").read_text())
    model = build_model(ModelConfig(name="resnet20"), 2, (3, 16, 16), seed=0)
    model.load_state_dict(load_file(export / "model.safetensors"))
    model.eval()

    known = summary["preprocessing"]
    transform = v2.Compose(
        [
            v2.Resize(known["resize"], v2.InterpolationMode(known["interpolation"])), v2.CenterCrop(known["size"]),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(known["mean"], known["std"]),
        ]
    )  # fmt: skip
    images = ImageFolder(str(runs.images / "val"), transform, loader=lambda path: Image.open(path).convert("RGB"))
    assert images.classes == known["classes"]
    with torch.no_grad():
        theirs = torch.cat([model(image[None]) for image, _ in images])
    labels = torch.tensor(images.targets)

    config = DataConfig(**{**summary["config"]["data"], "root": str(runs.images)})
    pipeline = open_dataset(config, 0, single(), Parts())
    with torch.no_grad():
        batches = list(pipeline.evaluate())
        ours = torch.cat([model(batch.images) for batch in batches])
    pipeline.close()
    assert torch.equal(torch.cat([batch.labels for batch in batches]), labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    accuracy = (theirs.argmax(1) == labels).double().mean().item()
    assert summary["accuracy"] == accuracy
    capsys.readouterr()
    from ghostmask.launcher.main import main

    assert main(["evaluate", str(runs.folder / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy


def test_a_network_of_one_size_refuses_another_before_it_is_trained(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.call("prepare", "run", "data.eval_size=24") == 0
    assert runs.call("train", "fixed", "model.name=conv4", "data.eval_size=24") == 2
    assert "data.eval_size = 24: the network takes images of 16 x 16 only" in capsys.readouterr().err
    assert not (runs.folder / "fixed" / "metrics.jsonl").exists()


def test_the_summary_names_the_preprocessing_of_data_that_have_none(tmp_path: Path) -> None:
    from ghostmask.data_pipelines.open import preprocessing

    known = preprocessing(DataConfig(dataset="synthetic", root=str(tmp_path), image_size=8))
    assert (known["size"], known["resize"], known["interpolation"]) == (8, None, None)
    assert known["mean"] == [0.5] * 3
