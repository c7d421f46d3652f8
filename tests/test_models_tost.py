"""Do ToST's hooks do to the network that a run trains what they promise, under a mask and with every mask method?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, Outcome, complete, configured, memory_run
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.hooks import Hook
from ghostmask.engine.sharding.optimizer import ShardedOptimizer
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World, single
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import masked_state
from ghostmask.launcher.settings import load_config
from ghostmask.launcher.values import as_text
from ghostmask.masks.mask_file import write_masks
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.registry import METHODS
from ghostmask.masks.scoring.topk import kept_count
from ghostmask.models.build import build_model
from ghostmask.models.config import TOST_PRESETS

RESNET = configured(CONFIG, model={"name": "digits_resnet"}, mask={"method": "random"}, finetune={"epochs": 0})
"""12 steps under a random mask of density 0.1."""


class At(Hook):
    """Calls a function at the start, after ToST's hooks, and after each step."""

    def __init__(self, call: Callable[[Trainer], None]) -> None:
        self.call = call

    def on_start(self, trainer: Trainer) -> None:
        self.call(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        self.call(trainer)


def fresh(config: RunConfig) -> nn.Module:
    return build_model(config.model, 4, MemoryData.image_shape, config.seed)


def rescaled(world: World, folder: str, config: RunConfig) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The network's parameters before the run, after LRsI and after the first step; the masks it trains under."""
    run, _ = memory_run(world, Path(folder), config)
    seen = [{n: p.detach().clone() for n, p in run.net.named_parameters()}]
    run.hooks = (At(lambda _: seen.append({n: p.detach().clone() for n, p in run.net.named_parameters()})),)
    run.execute(None)
    masks = {n: m.clone() for n, m in run.masks().items()}
    run.close()
    return seen[:3], masks


def gradient_norm(config: RunConfig, masks: dict[str, Tensor]) -> float:
    """|mean over the parts of the loss's gradient| of the network with weights w m, on the first batch, in float64."""
    net = fresh(config).double().train()
    points = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
    masked = {n: p * masks[n] if n in masks else p for n, p in points.items()}
    total: Any = 0.0
    count = config.train.replicas
    for part in range(count):
        images, labels = next(MemoryData(single(), parts=Parts(count, part, 1)).train(0))
        total += functional.cross_entropy(functional_call(net, masked, (images.double(),)), labels) / count
    return float(torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(points.values()))]).norm())


def test_lrsi_under_a_mask_keeps_zeros_and_scales_each_block_by_one_factor(tmp_path: Path) -> None:
    config = configured(RESNET, train={"zero_stage": 2, "epochs": 1}, optim={"lr": 1e-9, "weight_decay": 0.0},
                        tost={"lrsi": True, "lrsi_steps": 6})  # fmt: skip
    ranks = run_distributed(rescaled, 2, str(tmp_path), config)
    (before, scaled, stepped), masks = ranks[0]
    (_, alone, _), _ = run_distributed(rescaled, 1, str(tmp_path / "alone"), config)[0]
    assert sum(int(m.sum()) for m in masks.values()) < 0.11 * sum(m.numel() for m in masks.values())
    ratios = {}
    for name, start in before.items():
        mask = masks.get(name, torch.ones_like(start, dtype=torch.bool))
        old, new = start * mask, scaled[name] * mask
        assert not new[~mask].any()
        assert bool((new[mask & (start != 0)] != 0).all()), f"{name}: a kept weight was lost"
        ratio = new[old != 0] / old[old != 0]
        if len(ratio):
            ratios[name] = float(ratio.mean())
            assert float(ratio.max() - ratio.min()) < 1e-6, name
        torch.testing.assert_close(stepped[name], scaled[name], rtol=0, atol=1e-6)
        assert torch.equal(scaled[name], ranks[1][0][1][name])
        assert torch.equal(scaled[name], alone[name])
    assert sum(abs(ratio - 1) > 1e-3 for ratio in ratios.values()) > 10, "nothing was learned"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (learned,) = [line for line in lines if "lrsi/gradient_norm_first" in line]
    assert learned["lrsi/gradient_norm_first"] == pytest.approx(gradient_norm(config, masks), rel=1e-3)
    assert learned["lrsi/gradient_norm_first"] != pytest.approx(gradient_norm(config, {}), rel=0.1)


def hardened(world: World, folder: str, config: RunConfig) -> list[tuple[bool, bool]]:
    """At the start and after each step: are the outputs of the network in training a plain one's, and the gradients?"""
    data = MemoryData(world)
    run, _ = memory_run(world, Path(folder), config, data)
    images, labels = data.images[data.num_train :], data.labels[data.num_train :]
    seen: list[tuple[bool, bool]] = []

    def compare(trainer: Trainer) -> None:
        plain = fresh(config)
        plain.load_state_dict(masked_state(run.net, run.masks()), strict=True)
        assert any(type(m) is nn.ReLU for m in plain.modules())
        outputs = trainer.model.eval()(images), plain.eval()(images)
        gradients = [
            torch.autograd.grad(functional.cross_entropy(out, labels), net.get_parameter("bn1.bias"))[0]
            for out, net in zip(outputs, (run.net, plain), strict=True)
        ]
        trainer.model.train()
        seen.append((torch.equal(*outputs), torch.equal(*gradients)))

    run.hooks = (At(compare),)
    run.execute(None)
    run.close()
    return seen


@pytest.mark.parametrize("activation", ["pswish", "swish", "mish"])
def test_from_the_switch_on_the_trained_network_computes_exactly_the_one_with_relus(
    activation: str, tmp_path: Path
) -> None:
    config = configured(RESNET, tost={"ghost_swish": True, "activation": activation, "swish_fraction": 0.5})
    seen = run_distributed(hardened, 1, str(tmp_path), config)[0]
    assert seen == [(False, False)] * 6 + [(True, True)] * 7  # the start, then 12 steps; ReLU from step 6 on


TWEAKS = TOST_PRESETS["all"]
Scaled = tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]
"""LRsI's factors; the parameters before and after it."""
ALONE = {
    "ghost_skip": {"tost/alpha"}, "ghost_swish": {"tost/beta", "tost/soft"}, "label_smoothing": set[str](),
    "lrsi": {f"lrsi/{name}" for name in ("gradient_norm_first", "gradient_norm_last", "factor_min", "factor_max")},
}  # fmt: skip
"""Tweak -> what it logs."""
VARIANTS: dict[str, dict[str, Any]] = {
    "probmask of kernels": {"method": "probmask", "granularity": "kernel"},
    "supermask": {"method": "probmask", "train_weights": False},
    "magnitude of channels": {"method": "magnitude", "granularity": "channel"},
    "magnitude of a trained network": {"method": "magnitude", "path": "trained"},
    "gmp of a power": {"method": "gmp", "power": 2.0},
    "rigl 2:4": {"method": "rigl", "granularity": "2:4", "density": 0.5},
    "st3 with sigma": {"method": "st3", "sigma": True},
    "l0 of channels": {"method": "l0", "gates": "channel"},
}
CASES = {name: {"method": name, **({"path": "mask"} if name == "file" else {})} for name in METHODS} | VARIANTS
"""Every method, and the settings with which some are others."""
NO_MAIN_PHASE = "is not read with mask.path=trained; leave it out, or use a method with a main phase"
REFUSED: dict[str, dict[str, str]] = {
    "edge_popup": {
        "lrsi": "tost.lrsi = True: the weights stay as mask.init draws them, and batch norm at 1: their sizes belong "
        "to the method; give false"
    },
    "supermask": {
        "lrsi": "tost.lrsi = True: scales weights for the first step that they take, and mask.train_weights=false "
        "leaves them as they were drawn; give false"
    },
    "magnitude of a trained network": {
        tweak: f"tost.{tweak} = true: {NO_MAIN_PHASE}" for tweak in ("ghost_skip", "ghost_swish", "lrsi")
    },
}
"""Case -> tweak that it does not take -> the reason it gives. All others take all four."""
KILLED_ELSEWHERE = ("dense", "probmask", "magnitude", *VARIANTS)
"""tests/test_launcher_tweaks.py kills the first three, on 2 ranks."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mask.path names: a mask of density 0.1, a trained network."""
    folder = tmp_path_factory.mktemp("files")
    weights = prunable_weights(fresh(RESNET))
    masks = {n: w > w.flatten().kthvalue(int(0.9 * w.numel())).values for n, w in weights.items()}
    write_masks(folder / "mask.safetensors", masks, {})
    save_file(fresh(RESNET).state_dict(), folder / "trained.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in ("mask", "trained")}


def mask_of(case: str, files: dict[str, str]) -> dict[str, Any]:
    mask = CASES[case]
    return {**mask, "path": files[mask["path"]]} if "path" in mask else mask


def refusal(case: str, *tweaks: str) -> str:
    """What the one line says that refuses the tweaks with the method; nothing where it takes them."""
    given = {f"mask.{k}": v for k, v in CASES[case].items()} | {f"tost.{tweak}": TWEAKS[tweak] for tweak in tweaks}
    try:
        check_config(load_config(None, [f"{name}={as_text(value)}" for name, value in given.items()]), 1)
    except InputError as error:
        return str(error)
    return ""


def delivered(world: World, folder: str, config: RunConfig) -> tuple[Outcome, bool, list[Scaled]]:
    """A run to its end; is its network a plain one then, which computes what it should; what LRsI did."""
    seen: list[Scaled] = []
    data = MemoryData(world)
    run, saved = memory_run(world, Path(folder), config, data)
    scale = ShardedOptimizer.scale

    def watched(self: ShardedOptimizer, factors: dict[str, float]) -> None:
        before = evaluated(self, run.net)
        scale(self, factors)
        seen.append((factors, before, evaluated(self, run.net)))

    ShardedOptimizer.scale = watched  # type: ignore[method-assign]  # in this rank's process
    run.execute(saved)
    plain = fresh(config)
    plain.load_state_dict(masked_state(run.net, run.masks()), strict=True)
    kinds = [[(name, type(module)) for name, module in net.named_modules()] for net in (run.net, plain)]
    free = kinds[0] == kinds[1] and not any(m._forward_hooks or m._forward_pre_hooks for m in run.net.modules())
    with torch.no_grad():
        same = torch.equal(run.net.eval()(data.images), plain.eval()(data.images))
    weights = {n: t.detach().clone() for n, t in run.net.state_dict().items()}
    outcome = Outcome(weights, {n: m.clone() for n, m in run.masks().items()}, data.fed, saved.step if saved else 0)
    run.close()
    return outcome, free and same, seen


def evaluated(optimizer: ShardedOptimizer, net: nn.Module) -> dict[str, Tensor]:
    """The parameters that an evaluation would see."""
    optimizer.eval()
    found = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer.train()
    return found


@pytest.mark.parametrize("case", CASES)
def test_all_of_tost_with_every_mask_method_survives_a_kill_and_leaves_a_plain_network_or_says_why_not(
    case: str, files: dict[str, str], tmp_path: Path
) -> None:
    refused = REFUSED.get(case, {})
    assert {tweak: said for tweak in TWEAKS if (said := refusal(case, tweak))} == refused
    taken = [tweak for tweak in TWEAKS if tweak not in refused]
    assert refusal(case, *taken) == ""
    tost = {tweak: TWEAKS[tweak] for tweak in taken} | {"ghost_skip_fraction": 0.9, "lrsi_steps": 2}
    epochs = 2 if CASES[case]["method"] == "probmask" else 1
    config = configured(
        RESNET, mask=mask_of(case, files), train={"epochs": epochs}, finetune={"epochs": 1},
        checkpoint={"every_steps": 2}, tost=tost,
    )  # fmt: skip
    whole, plain, scaled = run_distributed(delivered, 1, str(tmp_path / "whole"), config)[0]
    assert plain, "something of ToST is left in the network"
    assert_logged(tmp_path / "whole", taken)
    assert len(scaled) == ("lrsi" in taken) * (4 if case == "lth" else 1), "once per round"
    for factors, before, after in scaled:
        assert_scaled(factors, before, after)
    assert_masked(case, config, whole)
    if case not in KILLED_ELSEWHERE:
        kill_step = 7 if case == "lth" else 3  # in the second round of lth
        with pytest.raises(RuntimeError, match="died with exit code -9"):
            run_distributed(complete, 1, str(tmp_path / "killed"), config, kill_step)
        resumed = run_distributed(complete, 1, str(tmp_path / "killed"), config)[0]
        assert resumed.resumed_at in (kill_step - 1, kill_step - 3)
        assert resumed.digest == whole.digest


def assert_logged(folder: Path, tweaks: list[str]) -> None:
    """Every tweak ran through its schedule: ghosts faded to nothing, soft activations became ReLUs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {key: [line[key] for line in lines if key in line] for key in {key for line in lines for key in line}}
    assert tost_names(logged) == set().union(*(ALONE[tweak] for tweak in tweaks))
    for tweak, key in (("ghost_skip", "tost/alpha"), ("ghost_swish", "tost/soft")):
        assert tweak not in tweaks or (logged[key][0] > 0 and logged[key][-1] == 0), key


def tost_names(logged: Iterable[str]) -> set[str]:
    return {key for key in logged if key.startswith(("tost/", "lrsi/")) and "lrsi/loss" not in key}


def assert_scaled(factors: dict[str, float], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """LRsI reached every parameter tensor: what is left of it is its learned factor times what was there."""
    assert factors.keys() == before.keys()
    assert len({factor for factor in factors.values() if factor != 1}) > 10, "nothing was learned"
    for name, factor in factors.items():
        kept = (before[name] != 0) & (after[name] != 0)  # a mask may be cut anew
        torch.testing.assert_close(after[name][kept], before[name][kept] * factor, rtol=1e-4, atol=1e-6, msg=name)


def assert_masked(case: str, config: RunConfig, outcome: Outcome) -> None:
    """Plain names; as many weights as the method promises, of all that can be pruned in the plain network."""
    net = fresh(config)
    assert list(outcome.weights) == list(net.state_dict())
    if case == "dense":
        assert not outcome.masks
        return
    weights = prunable_weights(net)
    assert {n: m.shape for n, m in outcome.masks.items()} == {n: w.shape for n, w in weights.items()}, "ghosts?"
    for name, mask in outcome.masks.items():
        assert not outcome.weights[name][~mask].any(), f"{name}: a pruned weight is not 0"
    settings, total = config.mask, sum(w.numel() for w in weights.values())
    granularity = getattr(settings, "granularity", "weight")
    if granularity in ("kernel", "channel"):
        assert 0 < outcome.kept <= kept_count(settings.density, total)
    elif granularity == "2:4":
        blocks = [block for mask in outcome.masks.values() for block in mask.split(4, 1)]
        assert all(bool((block.sum(1) == min(2, block.shape[1])).all()) for block in blocks)
    elif case != "file" and not settings.decided_by:
        assert outcome.kept == kept_count(settings.density, total)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]) -> Callable[[str], tuple[RunConfig, str]]:
    """method -> its configuration with one epoch, and the digest of a run without any tweak, made once."""
    made: dict[str, tuple[RunConfig, str]] = {}

    def get(method: str) -> tuple[RunConfig, str]:
        if method not in made:
            config = configured(RESNET, mask=mask_of(method, files), train={"epochs": 1})
            folder = str(tmp_path_factory.mktemp(method))
            made[method] = config, run_distributed(complete, 1, folder, config)[0].digest
        return made[method]

    return get


@pytest.mark.parametrize("method", ["probmask", "dense", "gmp", "file"])
@pytest.mark.parametrize("tweak", ALONE)
def test_each_tweak_alone_acts_and_is_logged_under_every_kind_of_mask(
    tweak: str, method: str, without: Callable[[str], tuple[RunConfig, str]], tmp_path: Path
) -> None:
    config, plain = without(method)
    config = configured(config, tost={tweak: TWEAKS[tweak], "lrsi_steps": 2})
    outcome = run_distributed(complete, 1, str(tmp_path), config)[0]
    assert outcome.digest != plain, "it changed nothing"
    fresh(config).load_state_dict(outcome.weights, strict=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for logged in ({key for line in lines for key in line}, set(events.Tags()["scalars"])):
        assert tost_names(logged) == ALONE[tweak]


def compiled(world: World, folder: str, config: RunConfig) -> tuple[dict[str, Tensor], int]:
    """The weights a run ends with, and how many graphs torch.compile made of it; traced, but not lowered to C++."""
    torch.compile = partial(torch.compile, backend="eager")  # in this rank's process
    torch._dynamo.utils.counters.clear()
    return complete(world, folder, config).weights, int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_a_compiled_run_goes_through_the_end_of_both_schedules_like_one_that_is_not(tmp_path: Path) -> None:
    """One graph with ghosts and PSwish, one with ghosts and ReLU, one of the plain network."""
    config = configured(
        RESNET, train={"epochs": 2}, tost={**TOST_PRESETS["all"], "ghost_skip_fraction": 0.7, "lrsi_steps": 2},
    )  # fmt: skip
    traced = configured(config, train={"compile": True})
    plain, none = run_distributed(compiled, 1, str(tmp_path / "plain"), config)[0]
    weights, graphs = run_distributed(compiled, 1, str(tmp_path / "compiled"), traced)[0]
    assert none == 0
    assert graphs >= 3
    for name, weight in plain.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)
