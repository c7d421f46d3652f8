"""Is a mask or network taken from any file that holds one, and is every other file answered in one line?"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ghostmask.engine.checkpoint.state_file import plain_names
from ghostmask.engine.errors import InputError
from ghostmask.masks.mask_file import load_trained, read_masks
from ghostmask.masks.prunable import prunable_weights


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    first, block = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    return nn.Sequential(first, block, nn.Flatten(), nn.Linear(8, 5))


NET = network()
STATE = NET.state_dict()
WEIGHTS = prunable_weights(NET)
MASKS = {name: torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.3 for name, w in WEIGHTS.items()}
Content = Mapping[str, object]


def beside(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_mask": mask for name, mask in masks.items()}


def masks_in(content: object, folder: Path, name: str = "m.pt") -> dict[str, Tensor]:
    torch.save(content, folder / name)
    return read_masks(str(folder / name), NET, WEIGHTS)


def refusal(content: object, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        masks_in(content, folder)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("mask.path = ")
    return str(caught.value)


NUMBERS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_a_mask_of_any_number_type_is_the_same_mask(dtype: torch.dtype, tmp_path: Path) -> None:
    content = {name: mask.to(dtype) for name, mask in MASKS.items()}
    same = [masks_in(content, tmp_path)]
    save_file(content, tmp_path / "m")  # a suffix is not needed
    same.append(read_masks(str(tmp_path / "m"), NET, WEIGHTS))
    same.append(masks_in({f"module.{name}": mask for name, mask in content.items()}, tmp_path))
    assert all(torch.equal(masks[name], MASKS[name]) for masks in same for name in MASKS)


@pytest.mark.parametrize(
    "content",
    [
        {**beside(MASKS), **STATE},
        {**STATE, **beside(MASKS)},
        {**{f"{name}_orig": w for name, w in STATE.items() if name in MASKS}, **beside(MASKS)},
        {f"net.{name}": mask for name, mask in {**beside(MASKS), **STATE}.items()},
        {name.removesuffix(".weight"): mask for name, mask in MASKS.items()},
        {name: mask.float().to_sparse() for name, mask in MASKS.items()},
        {name: mask * STATE[name] for name, mask in MASKS.items()},
        {"state_dict": {"model": {"state_dict": beside(MASKS)}}},
    ],
    ids=["before", "after", "orig", "prefix", "layers", "sparse", "zeros", "nested"],
)
def test_a_mask_counts_before_the_weight_beside_it_in_whatever_order_and_form(content: Content, tmp_path: Path) -> None:
    found = masks_in(content, tmp_path)
    assert all(torch.equal(found[name], MASKS[name]) for name in MASKS)


def bare(values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: values(mask) if name == "1.0.weight" else mask.float() for name, mask in MASKS.items()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bare(lambda m: torch.where(m, 1.0, torch.nan)), "1.0.weight holds nan"),
        (bare(lambda m: torch.where(m, torch.inf, 0.0)), "1.0.weight holds infinite values"),
        (bare(lambda m: torch.where(m, 1.0, torch.nan).to_sparse()), "1.0.weight holds nan"),
        (bare(lambda m: torch.empty(m.shape, device="meta")), "1.0.weight holds no values (meta)"),
        (bare(lambda m: torch.ones(m.shape, dtype=torch.complex64)), "1.0.weight holds complex numbers"),
        (bare(lambda m: torch.zeros(1).expand(10**6, 10**6)), "1.0.weight has shape (1000000, 1000000), the network's"),
        (bare(lambda _: torch.sparse_coo_tensor(size=(10**9, 10**9))), "1.0.weight has shape (1000000000, 1000000000)"),
        ({name: torch.zeros(mask.shape) for name, mask in MASKS.items()}, "keeps no weight at all"),
        ({**MASKS, "0": MASKS["0.weight"]}, "holds both 0.weight and 0, for one weight"),
        ({**beside(MASKS), "0_mask": MASKS["0.weight"]}, "holds both 0.weight_mask and 0_mask, for one weight"),
        ({**MASKS, "evil\x1b[31m": torch.ones(1)}, "holds evil\\x1b[31m, which this network does not have"),
        ({1: MASKS["0.weight"]}, "holds 1, which this network does not have"),
        ({"a": 1}, "holds no state dict"),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_named_with_its_layer(content: Content, expected: str, tmp_path: Path) -> None:
    assert expected in refusal(content, tmp_path)


def checkpointed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("1.0.", "1.0._orig_mod._checkpoint_wrapped_module."): t for name, t in state.items()}


@pytest.mark.parametrize(
    "content",
    [
        AveragedModel(NET).state_dict(),
        AveragedModel(nn.DataParallel(NET)).state_dict(),
        {"epoch": 3, "arch": "net", "state_dict": STATE},
        {"model": {f"model.{name}": t for name, t in STATE.items()}},
        {f"module._orig_mod.module.backbone.{name}": t for name, t in STATE.items()},
        checkpointed(STATE),
        {name: t.double() if t.is_floating_point() else t for name, t in STATE.items()},
        {name: t.to_sparse() if name == "3.weight" else t for name, t in STATE.items()},
    ],
    ids=["ema", "ema of ddp", "imagenet example", "lightning", "several", "wrapped", "double", "sparse"],
)
@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "weights", "m.safetensors"])
def test_a_trained_network_is_read_whoever_saved_it_and_whatever_the_file_is_called(
    content: Content, name: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / name)
    net = network(seed=1)
    load_trained(net, str(tmp_path / name))
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in net.state_dict().items())


def test_names_stay_as_they_are_where_no_prefix_makes_them_the_networks() -> None:
    content = {"features.a.weight": torch.ones(1), "features.b.weight": torch.ones(1)}
    assert plain_names(content, STATE) == content
    assert set(plain_names({"module.0.weight": torch.ones(1)}, {"module.0.weight": 0})) == {"module.0.weight"}
    assert set(plain_names({"module.a": torch.ones(1), "module.n_averaged": torch.ones(1)})) == {"a", "n_averaged"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
def test_a_network_with_values_that_are_not_finite_is_refused_with_the_layers_name(
    value: float, tmp_path: Path
) -> None:
    state = {name: t.double() if t.is_floating_point() else t for name, t in STATE.items()}
    state["1.1.running_var"] = torch.full((8,), value, dtype=torch.float64)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"mask\.path = .*: 1\.1\.running_var holds (nan|infinite values); the"):
        load_trained(network(), str(tmp_path / "m.pt"))


def test_no_file_is_waited_for_unpacked_without_end_or_executed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(STATE, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as archive,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry) + bytes(10**7 if "data/" in entry.filename else 0))
    reasons = {
        "pipe": "is a pipe or device, not a file",
        "zero": "is a pipe or device, not a file",
        "empty": "is empty",
        "bomb": "that unpacks to",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason):
            load_trained(network(), str(tmp_path / f"{name}.pt"))
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):  # cut off or overwritten at any place: one line, or a file that is still whole
        place = int(torch.randint(len(whole), (), generator=generator))
        damaged = whole[:place] if seed % 2 else whole[:place] + bytes([255]) * 8 + whole[place + 8 :]
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with suppress(InputError):
            load_trained(network(), str(tmp_path / "damaged.pt"))
