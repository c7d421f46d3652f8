"""Is every format of an export the same network, loaded by the lines of its model card, without ghostmask?"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sparse_exports import DIGITS, export, network
from torch import Tensor, nn
from torchvision.transforms import v2

from ghostmask.engine.errors import InputError
from ghostmask.launcher.cli import run_command
from ghostmask.launcher.exporting import coreml_file, two_four
from ghostmask.launcher.exporting.commands import folder_name
from ghostmask.launcher.exporting.convert import write_format
from ghostmask.launcher.exporting.exported import Options, read_exported
from ghostmask.launcher.exporting.load_two_four import load_two_four, use_two_four
from ghostmask.launcher.exporting.network_file import network_source
from ghostmask.launcher.exporting.registry import FORMATS
from ghostmask.launcher.record import EXPORTED, remove_written
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

ONNX = importlib.util.find_spec("onnxruntime") is not None
COREML = importlib.util.find_spec("coremltools") is not None
SAYS = """
import os, re, sys
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
images, results = load_file(sys.argv[1])["images"], {}
sys.modules["ghostmask"] = None  # as where it is not installed
for folder in sys.argv[2:]:
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.modules.pop("network", None)
    text = re.search(r"## Load.*?(?=\\n## )", open("README.md").read(), re.S)[0]
    for number, code in enumerate(re.findall(r"```python\\n(.*?)```", text, re.S)):
        exec(code, space := {})
        with torch.no_grad():
            results[f"{folder} {number}"] = torch.as_tensor(space["net"](images)).contiguous()
    sys.path.remove(folder)
save_file(results, sys.argv[1] + ".logits")
assert not [name for name in sys.modules if name.startswith("ghostmask.")]
"""
"""What somebody does who knows nothing but the folders: executes all lines of their cards that load them."""


def strangers(folders: list[Path], images: Tensor, tmp_path: Path) -> dict[str, Tensor]:
    """ "Folder number" -> logits of what its card's lines load, in another process that has no ghostmask."""
    file = tmp_path / "images.safetensors"
    save_file({"images": images}, file)
    command = [sys.executable, "-W", "ignore", "-c", SAYS, str(file), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return load_file(f"{file}.logits")


def two_of_four(net: nn.Module, names: list[str]) -> None:
    """Zero the two smaller of each four input channels' weights."""
    with torch.no_grad():
        for name in names:
            weight = net.get_parameter(name)
            groups = weight.movedim(1, -1).reshape(-1, 4)
            groups = groups.scatter(1, groups.abs().argsort(dim=1)[:, :2], 0.0)
            shape = weight.movedim(1, -1).shape
            weight.copy_(groups.reshape(shape).movedim(-1, 1))


def test_the_cards_of_all_formats_load_the_network_without_ghostmask(tmp_path: Path) -> None:
    shape = (3, 32, 32)
    net = network("digits_resnet", 10, shape, 0.3)
    two_of_four(net, ["layer3.0.conv2.weight", "layer3.0.downsample.0.weight", "fc.weight"])
    whole, vision = tmp_path / "plain", tmp_path / "torchvision"
    export(whole, net, "digits_resnet", shape)
    written = {"plain": whole}
    for name in sorted(set(FORMATS) - {"coreml"} - (set() if ONNX else {"onnx"})):
        written[name] = tmp_path / name.replace(":", "_")
        assert run_command(["export", str(whole), "--format", name, "--out", str(written[name])]) == 0
    for values, coding in (("fp16", "plain"), ("bf16", "entropy"), ("float32", "entropy")):
        written[f"{values} {coding}"] = tmp_path / f"{values}_{coding}"
        options = ["--values", values, "--coding", coding, "--out", str(written[f"{values} {coding}"])]
        assert run_command(["export", str(whole), "--format", "packed", *options]) == 0
    theirs = network("resnet18", 7, shape, 0.1)
    export(vision, theirs, "resnet18", shape)
    assert not (vision / "network.py").exists(), "torchvision builds it"
    images = torch.randn(6, *shape)
    logits = strangers([*written.values(), vision], images, tmp_path)
    with torch.no_grad():
        expected = net(images)
        assert torch.equal(logits[f"{vision} 0"], theirs(images))
    size = float(expected.abs().max())
    for name, folder in written.items():
        loose = 0.02 if "16" in name or name == "2:4" else 1e-5  # of half precision
        found = [outputs for key, outputs in logits.items() if key.startswith(f"{folder} ")]
        assert len(found) == (3 if name == "small" else 1), name
        assert all(float((outputs - expected).abs().max()) <= loose * size for outputs in found), name
    assert torch.equal(logits[f"{written['float32 entropy']} 0"], logits[f"{whole} 0"])
    needs = {
        name: re.findall(r"[Nn]eeds (.*?)[;)]", (folder / "README.md").read_text()) for name, folder in written.items()
    }
    assert needs["plain"] == needs["2:4"] == ["torch, safetensors"]
    assert needs["packed"] == ["torch, numpy, safetensors"]
    assert needs["small"] == ["torch, safetensors", "torch", "torch"]
    assert needs.get("onnx", ["torch, onnxruntime"]) == ["torch, onnxruntime"]


@pytest.mark.parametrize(("name", "options"), [("resnet9", {}), ("conv4", {}), ("resnet18_cifar", {"blurpool": True})])
def test_the_file_that_builds_a_network_of_ours_has_its_names_and_outputs(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    net = network(name, 5, (3, 16, 16), 0.5, **options)
    export(tmp_path, net, name, (3, 16, 16), **options)
    space: dict[str, Any] = {"__name__": "network"}
    exec((tmp_path / "network.py").read_text(), space)
    built = space["Network"]()
    built.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(built.eval()(images), net(images))


class Branching(nn.Module):
    """No graph holds it: its forward pass looks at the number of images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(images.flatten(1) if len(images) > 1 else images.reshape(1, -1))
        return logits


def branching(num_classes: int) -> nn.Module:
    """A user's own network."""
    return Branching(num_classes)


def test_a_network_that_no_graph_holds_is_exported_with_a_card_that_names_what_builds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{__name__}:branching"
    net = build_model(ModelConfig(name), 4, DIGITS, 0).eval()
    export(tmp_path, net, name, DIGITS)
    assert f"build_model(ModelConfig('{name}'" in (tmp_path / "README.md").read_text()
    assert "Needs torch, safetensors, ghostmask;" in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match=r"cannot be written as a graph by torch\.fx"):
        run_command(["export", str(tmp_path), "--format", "small"])
    assert not (tmp_path / "small").exists()
    assert run_command(["export", str(tmp_path), "--format", "packed"]) == 0


def test_the_card_has_hugging_face_s_header_and_what_a_reader_asks_for(tmp_path: Path) -> None:
    summary = export(tmp_path, network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    text = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["pipeline_tag"] == "image-classification"
    assert header["datasets"] == ["uoft-cs/cifar10"]
    (result,) = header["model-index"][0]["results"]
    assert [m["value"] for m in result["metrics"]] == [0.875, 0.99]
    assert f"| density | {summary['density']:.4%} |" in text
    assert "at step 90 of 100" in text
    assert all(f"| {layer['name']} |" in text for layer in summary["layers"])
    code = re.search(r"## Images.*?```python\n(.*?)```", text, re.S)
    assert code is not None
    space: dict[str, Any] = {}
    exec(code[1], space)
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    known = summary["preprocessing"]
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(known["mean"])) / torch.tensor(known["std"])
    torch.testing.assert_close(space["transform"](image)[:, 0, 0], expected)


def test_a_card_names_classes_and_photographs_are_resized_by_its_lines() -> None:
    from ghostmask.launcher.exporting.card import _classes, _images

    known = {
        "size": 16, "resize": 20, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
        "exif": True, "mirrored": True, "classes": ["n01", "n02"], "words": {"n01": "tench"},
    }  # fmt: skip
    about = {"preprocessing": known, "network": {"num_classes": 2, "image_shape": [3, 16, 16]}}
    assert _classes(about) == "- 0: n01 (tench)\n- 1: n02"
    text = _images(about)
    space: dict[str, Any] = {}
    exec(text.split("```python\n")[1].rstrip("`"), space)
    assert space["transform"](Image.new("RGB", (50, 40))).shape == (3, 16, 16)
    assert isinstance(space["transform"].transforms[0], v2.Resize)
    assert "EXIF" in text
    assert "mirror" in text


def test_every_key_of_the_summary_is_explained(tmp_path: Path) -> None:
    document = (Path(__file__).resolve().parents[1] / "docs" / "export.md").read_text()
    summary = export(tmp_path, network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    keys = {*summary, *summary["preprocessing"], *summary["network"], *summary["run"], *summary["file"]}
    keys |= set(summary["layers"][0])
    assert [key for key in keys if f"`{key}`" not in document] == []


def test_restart_knows_the_folders_of_all_formats() -> None:
    assert {folder_name(name) for name in FORMATS} == set(EXPORTED)


def test_restart_removes_all_formats_and_leaves_others_files(tmp_path: Path) -> None:
    weights = tmp_path / "export" / "coreml" / "model.mlpackage" / "Data" / "weights"
    weights.mkdir(parents=True)
    (weights / "weight.bin").touch()
    for name in ("export/packed/load_packed.py", "export/small/model.pt2", "export/small/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    export(tmp_path / "export", network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    assert remove_written(tmp_path) == ["export"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.txt"]


def test_the_file_s_digest_and_size_stand_in_the_summary(tmp_path: Path) -> None:
    import hashlib

    summary = export(tmp_path, network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert summary["file"]["bytes"] == len(content)
    assert summary["file"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_layers_that_are_not_2_4_stay_dense_and_are_named(tmp_path: Path) -> None:
    net = network("digits_resnet", 10, DIGITS, 0.5)
    names = ["layer2.0.downsample.0.weight", "layer3.0.conv2.weight", "layer3.0.downsample.0.weight"]
    with torch.no_grad():
        net.get_parameter("conv1.weight").fill_(0.5)  # three input channels: none is 2:4
    two_of_four(net, names)
    others = [n for n, w in net.named_parameters() if w.dim() > 1 and not two_four.is_two_four(w)]
    assert not set(names) & set(others)
    export(tmp_path, net, "digits_resnet", DIGITS)
    written = write_format(read_exported(tmp_path), tmp_path / "x", "2:4", Options())
    assert all(name in written.notes[0] for name in others)
    state, packed = load_two_four(str(tmp_path / "x" / two_four.FILE))
    assert set(names) <= set(packed)
    for name, tensor in net.state_dict().items():
        expected = tensor.half().float() if tensor.dim() > 1 else tensor
        assert torch.equal(state[name], expected), name
    images = torch.randn(3, *DIGITS)
    net.load_state_dict(state)
    with torch.no_grad():
        expected = net(images)
        sparse = use_two_four(net, packed, convert=lambda weight: weight)  # the wiring; the product itself needs a GPU
        assert type(sparse.get_submodule("layer3.0.downsample.0")).__name__ == "Pointwise"
        torch.testing.assert_close(sparse(images), expected, rtol=1e-5, atol=1e-5)


def test_a_network_without_a_2_4_layer_is_refused_in_one_line(tmp_path: Path) -> None:
    export(tmp_path, network("digits_resnet", 10, DIGITS, 1.0), "digits_resnet", DIGITS)
    with pytest.raises(InputError, match=r"--format = '2:4': none of 10 layers is 2:4"):
        run_command(["export", str(tmp_path), "--format", "2:4"])


@pytest.mark.parametrize(("name", "module"), [("onnx", "onnx"), ("coreml", "coremltools")])
def test_a_format_without_its_library_says_what_installs_it(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path, network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"--format = '{name}': needs {module} .*pip install") as error:
        run_command(["export", str(tmp_path), "--format", name])
    assert "\n" not in str(error.value)
    assert not (tmp_path / name).exists()


@pytest.mark.skipif(not COREML, reason="needs coremltools")
def test_core_ml_keeps_exactly_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import coremltools.optimize.coreml as optimize
    from coremltools.models import MLModel

    from ghostmask.launcher.exporting.small import shrink

    net = network("digits_resnet", 10, DIGITS, 0.2)
    with torch.no_grad():
        net.get_parameter("layer1.0.conv1.weight").mul_(1e-6)  # below what the default pass takes for 0
    export(tmp_path, net, "digits_resnet", DIGITS)
    write_format(read_exported(tmp_path), tmp_path / "x", "coreml", Options())
    model = MLModel(str(tmp_path / "x" / coreml_file.FILE), skip_model_load=True)
    whole = optimize.decompress_weights(model)
    found = optimize.get_weights_metadata(whole, weight_threshold=1)
    small = shrink(net, DIGITS).graph
    theirs = sorted(int((data.val != 0).sum()) for data in found.values() if data.val.ndim > 1)
    ours = sorted(int((w != 0).sum()) for w in small.state_dict().values() if w.dim() > 1)
    assert theirs == ours
    text = (tmp_path / "x" / "README.md").read_text()
    assert "Needs torch, coremltools on a Mac;" in text
    monkeypatch.chdir(tmp_path / "x")
    (code,) = re.findall(r"```python\n(.*?)```", text.partition("## Images")[0], re.DOTALL)
    exec(code, space := {})
    image = torch.randn(1, *DIGITS)
    if sys.platform == "darwin":  # elsewhere the file can be read, and not run
        torch.testing.assert_close(torch.as_tensor(space["net"](image)), net(image), rtol=1e-3, atol=1e-3)


def test_options_of_packed_are_refused_elsewhere_and_a_folder_without_an_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--values, --coding: mean something for --format packed only, not for onnx"):
        run_command(["export", "nothing", "--format", "onnx", "--values", "fp16"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(InputError, match="finish the run, or write it with: ghostmask export"):
        run_command(["export", str(tmp_path / "run"), "--format", "packed"])
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": 1.0}))
    with pytest.raises(InputError, match=r"its summary.json cannot be used \(there is no 'network'\); write it again"):
        run_command(["export", str(tmp_path), "--format", "packed"])


def test_an_export_that_the_run_has_overtaken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints" / "step-00000095").mkdir(parents=True)
    export(tmp_path / "export", network("digits_resnet", 10, DIGITS, 0.3), "digits_resnet", DIGITS)
    assert run_command(["export", str(tmp_path), "--format", "packed"]) == 0
    assert "is of step 90, the run is at 95" in capsys.readouterr().err
    assert (tmp_path / "export" / "packed" / "README.md").is_file()


def test_a_layer_whose_text_leaves_out_what_it_does_is_refused() -> None:
    for pool, written in ((nn.AvgPool2d(2, divisor_override=3), True), (nn.Hardtanh(), False)):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Flatten(), nn.Linear(36 if written else 144, 2)).eval()
        if written:
            assert "divisor_override=3" in network_source(net, "A network.", (3, 8, 8), 2)
        else:
            pool.forward = lambda x: x + 1  # type: ignore[method-assign]
            with pytest.raises(InputError, match=r"Hardtanh.* does more than its text says"):
                network_source(net, "A network.", (3, 8, 8), 2)
