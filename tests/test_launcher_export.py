"""Is the export a plain network that anyone can load, with exact zeros and exact numbers?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, configured, memory_run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from ghostmask.engine.errors import InputError
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import load_export, summarise, write_export
from ghostmask.launcher.train import finish
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.scoring.topk import kept_count
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

SHAPE = (3, 8, 8)


def _net() -> nn.Module:
    return build_model(ModelConfig("digits_resnet"), 10, SHAPE, seed=0)


def _masks(net: nn.Module, density: float = 0.3, leave_out: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(w.shape, generator=generator) < density for n, w in prunable_weights(net, leave_out).items()}


def _write(folder: Path, net: nn.Module, masks: dict[str, Tensor], accuracy: float | None = 0.5) -> dict[str, object]:
    return write_export(folder, net, masks, accuracy=accuracy, image_shape=SHAPE, config={"seed": 3, "layers": (1, 2)})


READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from torchvision.models import resnet50
torch.set_num_threads(1)
net = resnet50()
print(net.load_state_dict(load_file(sys.argv[1]), strict=True))
save_file({"logits": net.eval()(load_file(sys.argv[2])["images"])}, sys.argv[3])
ours = {"launcher", "masks", "models", "data_pipelines", "engine", "deepspeed"} & set(sys.modules)
assert not ours, ours
"""


def test_unmodified_torchvision_loads_an_exported_resnet50_and_computes_the_same(tmp_path: Path) -> None:
    net = build_model(ModelConfig("resnet50"), 1000, (3, 64, 64), seed=0).to(memory_format=torch.channels_last)
    masks = _masks(net)
    net(torch.randn(2, 3, 64, 64))  # batch-norm statistics that are not the initial ones
    images = torch.randn(2, 3, 64, 64)
    masked = {n: w.detach() * masks[n] for n, w in prunable_weights(net).items()}
    with torch.no_grad():
        expected = functional_call(net.eval(), masked, (images,))
    write_export(tmp_path, net, masks, accuracy=None, image_shape=(3, 64, 64), config={})
    save_file({"images": images}, tmp_path / "images.safetensors")
    files = [str(tmp_path / name) for name in ("model.safetensors", "images.safetensors", "logits.safetensors")]
    # -I: no PYTHONPATH and no working directory on the path, as on a machine without ghostmask.
    done = subprocess.run([sys.executable, "-I", "-c", READER, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "All keys matched" in done.stdout
    torch.testing.assert_close(load_file(files[2])["logits"], expected, rtol=1e-5, atol=1e-5)


def test_masked_places_hold_positive_zeros_and_all_others_the_weights_bit_by_bit(tmp_path: Path) -> None:
    net = _net()
    with torch.no_grad():
        net.get_parameter("conv1.weight").fill_(-1.0)
        net.get_parameter("fc.weight")[0, 0] = torch.inf
    masks = _masks(net)
    masks["fc.weight"][0, 0] = False
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _write(tmp_path, net, masks)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == before.keys()
    for name, tensor in before.items():
        mask = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(written[name][mask], tensor[mask])
        assert not written[name][~mask].signbit().any()
        assert torch.equal(written[name][~mask], torch.zeros(int((~mask).sum())))
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)


def test_the_summary_counts_what_the_masks_keep(tmp_path: Path) -> None:
    net = _net()
    masks = _masks(net, leave_out=("fc.weight",))
    summary = _write(tmp_path, net, masks, accuracy=0.875)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert list(summary) == [
        *("accuracy", "density", "kept", "prunable", "flops_dense", "flops_sparse", "layers", "file", "config")
    ]
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert summary["accuracy"] == 0.875
    assert summary["config"] == {"seed": 3, "layers": (1, 2)}
    assert (summary["kept"], summary["prunable"]) == (kept, 307_296 - 1_280)
    assert summary["density"] == kept / (307_296 - 1_280)
    flops = [(layer.pop("flops_dense"), layer.pop("flops_sparse")) for layer in summary["layers"]]
    assert summary["layers"] == [
        {
            "name": n,
            "shape": list(m.shape),
            "kept": int(m.sum()),
            "density": int(m.sum()) / m.numel(),
            "channels_removed": sum(not bool(row.any()) for row in m),
        }
        for n, m in masks.items()
    ]
    assert flops[0] == (2 * 64 * masks["conv1.weight"].numel(), 2 * 64 * int(masks["conv1.weight"].sum()))
    outside = 2 * 1_280  # the layer without a mask
    assert sum(dense for dense, _ in flops) + outside == summary["flops_dense"]
    positions = {"conv1": 64, "layer1": 64, "layer2": 16, "layer3": 4}
    sparse = sum(2 * positions[name.split(".")[0]] * int(mask.sum()) for name, mask in masks.items())
    assert summary["flops_sparse"] == sparse + 2 * 1_280  # the classifier stays dense


def test_a_dense_run_exports_the_network_as_it_is_at_density_1(tmp_path: Path) -> None:
    net = _net()
    summary = _write(tmp_path, net, {}, accuracy=None)
    assert (summary["accuracy"], summary["density"], summary["kept"]) == (None, 1.0, 307_296)
    assert summary["flops_dense"] == summary["flops_sparse"]
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in net.state_dict().items())


def test_others_may_read_the_export_as_any_file_of_this_user(tmp_path: Path) -> None:
    _write(tmp_path, _net(), {})
    (tmp_path / "any").touch()
    assert len({(tmp_path / name).stat().st_mode for name in ("any", "model.safetensors", "summary.json")}) == 1


def test_a_failed_export_leaves_the_earlier_one_whole(tmp_path: Path) -> None:
    net = _net()
    _write(tmp_path, net, _masks(net))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert sorted(before) == ["model.safetensors", "summary.json"]
    with pytest.raises(ValueError, match="JSON"):
        _write(tmp_path, net, {}, accuracy=float("nan"))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("bn1.weight", torch.ones(16, dtype=torch.bool)),
        ("fc.weight", torch.ones(10, 63, dtype=torch.bool)),
        ("fc.weight", torch.ones(10, 64)),
    ],
)
def test_a_mask_that_fits_no_weight_is_an_error(name: str, mask: Tensor) -> None:
    with pytest.raises(ValueError, match=f"mask {name}: .* fits no prunable weight"):
        summarise(_net(), {name: mask}, SHAPE)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_state_dicts_of_torch_save_are_read(tmp_path: Path, suffix: str, wrapped: bool) -> None:
    state = _net().state_dict()
    path = tmp_path / f"net{suffix}"
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    read = load_export(path)
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_an_export_is_read_back(tmp_path: Path) -> None:
    net = _net()
    _write(tmp_path, net, _masks(net))
    assert _net().load_state_dict(load_export(tmp_path / "model.safetensors"), strict=True)


@pytest.mark.parametrize("begin", [b"\x80", b"PK"])
def test_a_safetensors_file_whose_length_begins_as_a_pickle_or_an_archive_does_is_read(
    tmp_path: Path, begin: bytes
) -> None:
    path, state = tmp_path / "net.safetensors", {"w": torch.arange(6.0)}
    length = int.from_bytes(begin.ljust(2, b"\x02"), "little")
    save_file(state, path)
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + content[8 + len(header) :])
    assert path.read_bytes().startswith(begin)
    assert torch.equal(load_export(path)["w"], state["w"])


class Executes:
    """Unpickling this would run a function of the file's choice."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_files_that_hold_no_weights_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole.safetensors"
    save_file({"w": torch.zeros(100)}, whole)
    (tmp_path / "torn.safetensors").write_bytes(whole.read_bytes()[:-20])
    torch.save({"w": torch.zeros(100)}, "whole.pt")
    (tmp_path / "torn.pt").write_bytes(Path("whole.pt").read_bytes()[:-200])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no weights here")
    (tmp_path / "folder.pt").mkdir()
    torch.save(Executes(), "executes.pt")
    torch.save([torch.zeros(2)], "list.pt")
    torch.save({"epoch": 3}, "numbers.pt")
    torch.save({}, "nothing.pt")
    (tmp_path / "net.onnx").write_bytes(b"\x08\x07 onnx")
    reasons = {
        "torn.safetensors": "cannot be read",
        "torn.pt": "cannot be read",
        "empty.pt": "is empty",
        "text.pth": "cannot be read",
        "executes.pt": "cannot be read",
        "list.pt": "holds no state dict",
        "numbers.pt": "holds no state dict",
        "nothing.pt": "holds no state dict",
        "absent.pt": "there is no such file",
        "folder.pt": "is a folder, not a file",
        "net.onnx": "cannot be read",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=f"mask.path = '{name}': {reason}") as error:
            load_export(Path(name))
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def exported(world: World, folder: str, config: RunConfig) -> dict[str, Tensor]:
    """The masks that a run ends with; it exports its network on the way."""
    run, _ = memory_run(world, Path(folder), config)
    run.execute(None)
    finish(run, Path(folder) / "export", Path(folder))
    run.close()
    return {name: mask.clone() for name, mask in run.masks().items()}


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), ("bf16", 2), ("fp32", 0)])
@pytest.mark.parametrize("method", ["probmask", "gmp", "dense"])
def test_whatever_a_run_computes_in_its_export_is_float32_with_exactly_the_masks_zeros(
    method: str, precision: str, stage: int, tmp_path: Path
) -> None:
    settings = {"precision": precision, "zero_stage": stage, "epochs": 2}
    config = configured(CONFIG, mask={"method": method}, train=settings, finetune={"epochs": 1})
    masks, same = run_distributed(exported, 2, str(tmp_path), config)
    written = load_file(tmp_path / "export" / "model.safetensors")
    net = build_model(config.model, 4, MemoryData.image_shape, seed=9)
    net.load_state_dict(written, strict=True)
    assert {tensor.dtype for tensor in written.values()} <= {torch.float32, torch.int64}
    assert any(bool((t != t.bfloat16()).any()) for t in written.values()), "rounded to bfloat16"
    assert masks.keys() == same.keys() == (set() if method == "dense" else prunable_weights(net).keys())
    for name, mask in masks.items():
        assert torch.equal(written[name] != 0, mask)
    if masks:
        assert sum(int(m.sum()) for m in masks.values()) == kept_count(0.1, sum(m.numel() for m in masks.values()))
