"""Do the finders keep their promises: no harm to the network, one mask on all ranks, no layer lost unnoticed?"""

from __future__ import annotations

import random
from argparse import Namespace
from contextlib import redirect_stderr
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, complete, configured
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.errors import InputError
from ghostmask.engine.registry import resolve
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.launcher.checks import check_finder
from ghostmask.masks.mask_file import write_masks
from ghostmask.masks.masked import density_of
from ghostmask.masks.method import Recipe
from ghostmask.masks.one_shot import OneShot
from ghostmask.masks.registry import METHODS
from ghostmask.masks.scoring.topk import empty_layers, kept_count
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

RECIPE = Recipe(OptimConfig(), FinetuneConfig(), epochs=1, seed=3)
SCORING = ("random", "snip", "grasp", "synflow", "mlprune", "magnitude")
SMALL = {"score_batch": 24, "score_batches": 2, "samples_per_class": 9, "iterations": 5}


def digits_net() -> nn.Module:
    return build_model(ModelConfig(name="digits_resnet"), 4, MemoryData.image_shape, seed=3)


def finder(name: str, net: nn.Module, world: World, **settings: Any) -> Any:
    cls = resolve(METHODS[name])
    known = {field.name for field in fields(cls.Settings)}
    small = {key: value for key, value in SMALL.items() if key in known}
    return cls(cls.Settings(method=name, **{**small, **settings}), net, RECIPE, world)


def everything_about(net: nn.Module) -> dict[str, Any]:
    """All that a finder could change: tensors bit for bit, modes, hooks, gradients, and the random generators."""
    return {
        "tensors": {n: t.numpy().tobytes() for n, t in net.state_dict().items()},
        "addresses": [t.data_ptr() for t in net.state_dict().values()],
        "trained": [(n, p.requires_grad, p.grad is None) for n, p in net.named_parameters()],
        "modes": [(n, m.training, type(m), getattr(m, "inplace", None)) for n, m in net.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
        "tf32": torch.backends.cudnn.allow_tf32,
        "random": (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SCORING)
def test_a_finder_leaves_the_network_and_the_random_numbers_exactly_as_they_were(name: str, training: bool) -> None:
    net = digits_net()
    net(torch.randn(8, 3, 8, 8))
    net.train(training)
    net.get_submodule("layer2").train(not training)
    before = everything_about(net)
    finder(name, net, single()).find(MemoryData(single()))
    assert everything_about(net) == before


def found_by_all(world: World) -> dict[str, dict[str, Tensor]]:
    data = MemoryData(world)
    # Chunks of 2 images leave one of three ranks without any.
    small = {"grasp small": {"score_batch": 6, "samples_per_class": 1}, "mlprune small": {"score_batch": 2}}
    settings: dict[str, dict[str, int]] = {**{name: {} for name in SCORING}, **small}
    return {n: finder(n.split()[0], digits_net(), world, **s).find(data) for n, s in settings.items()}


def test_three_ranks_find_the_same_masks_as_one_on_the_same_images() -> None:
    alone = run_distributed(found_by_all, 1)[0]
    ranks = run_distributed(found_by_all, 3)
    for name in alone:
        total = sum(m.numel() for m in alone[name].values())
        differing = sum(int((m != ranks[0][name][n]).sum()) for n, m in alone[name].items())
        assert differing <= 0.001 * total, f"{name}: {differing} of {total}"
        for masks in (alone[name], *(rank[name] for rank in ranks)):
            assert sum(int(m.sum()) for m in masks.values()) == kept_count(0.1, total)
            assert all(torch.equal(m, ranks[0][name][n]) for n, m in masks.items() if masks is not alone[name])


def found_among_ties(world: World) -> dict[str, dict[str, Tensor]]:
    """Half of the weights are 0, and with them their scores: more than are pruned, so that ties decide."""
    data, net = MemoryData(world), digits_net()
    with torch.no_grad():
        for w in net.parameters():
            w.view(-1)[::2] = 0.0
    return {name: finder(name, net, world, density=0.7).find(data) for name in SCORING if name != "random"}


def test_equal_scores_are_told_apart_by_chance_and_alike_on_one_and_on_three_ranks() -> None:
    alone, *ranks = (*run_distributed(found_among_ties, 1), *run_distributed(found_among_ties, 3))
    for name, masks in alone.items():
        total = sum(m.numel() for m in masks.values())
        kept = torch.cat([m.reshape(-1) for m in masks.values()])
        assert int(kept.sum()) == kept_count(0.7, total)
        shares = [float(m.reshape(-1)[::2].float().mean()) for m in masks.values() if m.numel() > 5000]
        assert min(shares) > 0.2, f"{name}: whole layers were lost, or preferred, among equal scores"
        assert max(shares) < 0.8
        for rank in ranks:
            differing = int((torch.cat([m.reshape(-1) for m in rank[name].values()]) != kept).sum())
            assert differing <= 0.001 * total, f"{name}: {differing} of {total}"
            assert all(torch.equal(m, ranks[0][name][n]) for n, m in rank[name].items())


class Listener(World):
    """Remembers the types of what is gathered from all ranks."""

    gathered: ClassVar[list[torch.dtype]] = []

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.gathered.append(tensor.dtype)
        return super().all_gather(tensor)


def types_gathered(world: World) -> list[torch.dtype]:
    found_by_all(Listener(world.rank, world.size, world.device, world.group))
    return Listener.gathered


def test_scores_stay_on_their_rank_and_only_masks_labels_and_counts_are_gathered() -> None:
    types = run_distributed(types_gathered, 2)[0]
    assert torch.uint8 in types, "the masks"
    assert not [dtype for dtype in types if dtype.is_floating_point]


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "mlprune", "magnitude"])
def test_layerwise_masks_have_the_same_density_in_every_layer(name: str) -> None:
    masks = finder(name, digits_net(), single(), constraint="layerwise").find(MemoryData(single()))
    assert all(int(m.sum()) == kept_count(0.1, m.numel()) for m in masks.values())


def test_a_lost_layer_is_named_and_a_minimum_protects_it() -> None:
    lost = finder("snip", digits_net(), single(), density=3e-5).find(MemoryData(single()))
    names = empty_layers(lost)
    assert names
    lines: list[str] = []
    method = finder("snip", digits_net(), single(), density=3e-5)
    for _ in range(2):
        method.settle(lost, lines.append, method.counts())
    warning, what = lines  # each once
    advice = "mask.min_per_layer=1 keeps some"
    assert warning == f"warning: {len(names)} of 10 layers have no weight left: {', '.join(names)}; {advice}"
    assert what.startswith("mask: density 2.93611e-05, 9 of 306,528 weights")
    for name in SCORING:
        kept = finder(name, digits_net(), single(), density=1e-3, min_per_layer=3).find(MemoryData(single()))
        assert all(int(m.sum()) >= 3 for m in kept.values()), name
        assert density_of(kept) == pytest.approx(1e-3, rel=2e-3)
        assert empty_layers(kept) == []


@pytest.mark.parametrize("name", ["snip", "random"])
def test_a_minimum_above_the_budget_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"mask\.min_per_layer = 9: .*10 layers need 90 weights"):
        finder(name, digits_net(), single(), density=1e-4, min_per_layer=9).find(MemoryData(single()))


class Cifar(MemoryData):
    """A few images of 32 x 32."""

    image_shape = (3, 32, 32)


def test_synflow_keeps_every_layer_of_vgg19_at_density_0_001_where_snip_loses_some() -> None:
    """20 million weights. SNIP sees 24 images; SynFlow none, in 25 iterations instead of its 100, to save time."""
    net = build_model(ModelConfig(name="vgg19"), 4, Cifar.image_shape, seed=0)
    data = Cifar(single(), num_train=24, num_eval=4)
    lost = empty_layers(finder("snip", net, single(), density=1e-3, score_batches=1).find(data))
    flow = finder("synflow", net, single(), density=1e-3, iterations=25).find(data)
    assert lost
    assert empty_layers(flow) == []
    assert sum(int(m.sum()) for m in flow.values()) == kept_count(1e-3, sum(m.numel() for m in flow.values()))


def test_find_mask_is_for_exactly_the_methods_that_have_a_finder() -> None:
    for name, entry in METHODS.items():
        reads_path = "path" in {field.name for field in fields(resolve(entry).Settings)}
        config = configured(CONFIG, mask={"method": name, **({"path": "x"} if reads_path else {})})
        cls = resolve(entry)
        assert issubclass(cls, OneShot) == hasattr(cls, "find")
        if issubclass(cls, OneShot):
            check_finder(config)
        else:
            with pytest.raises(InputError, match=f"mask.method = '{name}': finds its mask by training"):
                check_finder(config)
    with pytest.raises(InputError, match=r"mask\.path = '': name the trained network"):
        check_finder(configured(CONFIG, mask={"method": "magnitude"}))


def read(path: Path, **settings: Any) -> dict[str, Tensor]:
    method = finder("file", digits_net(), single(), path=str(path), **settings)
    method.prepare()
    masks: dict[str, Tensor] = method.find(MemoryData(single()))
    return masks


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_a_mask_is_read_back_from_any_file_that_holds_it(tmp_path: Path) -> None:
    masks = finder("random", digits_net(), single(), dense_layers=("fc.weight",)).find(MemoryData(single()))
    dense = {"dense_layers": ("fc.weight",)}
    write_masks(tmp_path / "ours.safetensors", masks, {"method": "random"})
    state = digits_net().state_dict()
    for name, mask in masks.items():
        state[name] = state[name] * mask
    save_file(state, tmp_path / "export.safetensors")
    for key in ("state_dict", "model", "model_state_dict", "net"):
        torch.save({key: {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, tmp_path / f"{key}.pt")
    torch.save({"model": state, "args": Namespace(lr=0.1), "epoch": 3}, tmp_path / "torchvision_reference.pth")
    torch.save({f"_orig_mod.module.{n}": t for n, t in state.items()}, tmp_path / "compiled.pth")
    torch.save({f"module._orig_mod.{n}": t for n, t in state.items()}, tmp_path / "distributed.pth")
    for dtype in (torch.bool, torch.uint8, torch.float32, torch.float64):
        torch.save({n.removesuffix(".weight"): m.to(dtype) for n, m in masks.items()}, tmp_path / f"{dtype}.pt")
    pruned = digits_net()
    for name, mask in masks.items():
        layer = pruned.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(layer, "weight", mask)  # type: ignore[no-untyped-call]
    torch.save(pruned.state_dict(), tmp_path / "prune.pt")
    files = list(tmp_path.iterdir())
    assert len(files) == 14
    for file in files:
        assert same(read(file, **dense), masks), file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("layer1.0.conv1.weight"), "has no mask for layer1.0.conv1.weight; leave them unpruned"),
        (lambda m: m.update({"layer9.conv.weight": torch.ones(1)}), "holds layer9.conv.weight, which this network"),
        (lambda m: m.update({"conv1.weight": torch.ones(32, 3, 5, 5)}), r"conv1.weight has shape \(32, 3, 5, 5\)"),
        (lambda m: m.update({"fc.weight": torch.zeros(4, 128)}), "prunes fc.weight, which mask.dense_layers keeps"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_in_one_line(change: Any, said: str, tmp_path: Path) -> None:
    masks = finder("random", digits_net(), single(), dense_layers=("fc.weight",)).find(MemoryData(single()))
    change(masks)
    torch.save(masks, tmp_path / "mask.pt")
    with pytest.raises(InputError, match=said) as caught:
        read(tmp_path / "mask.pt", dense_layers=("fc.weight",))
    assert "\n" not in str(caught.value)


def said(world: World, folder: str, config: Any) -> str:
    """What a run prints while it trains."""
    with redirect_stderr(StringIO()) as printed:
        complete(world, folder, config)
    return printed.getvalue()


@pytest.mark.parametrize("method", ["snip", "magnitude"])
def test_a_run_names_the_layers_that_it_loses(method: str, tmp_path: Path) -> None:
    config = configured(
        CONFIG, model={"name": "digits_resnet"}, mask={"method": method, "density": 3e-5}, train={"epochs": 1},
        finetune={"epochs": 1 if method == "magnitude" else 0},
    )  # fmt: skip
    printed = run_distributed(said, 1, str(tmp_path), config)[0]
    assert "mask: density 2.9" in printed
    assert "of 10 layers have no weight left: " in printed
