"""Do ToST's hooks do to the network that a run trains what they promise, under a mask and with every mask method?"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, complete, configured, memory_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ghostmask.engine.data import Parts
from ghostmask.engine.hooks import Hook
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World, single
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import masked_state
from ghostmask.launcher.settings import settings_of
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


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("file") / "mask.safetensors"
    weights = prunable_weights(fresh(RESNET))
    write_masks(path, {n: w > w.flatten().kthvalue(int(0.9 * w.numel())).values for n, w in weights.items()}, {})
    return str(path)


def mask_of(method: str, file: str) -> dict[str, Any]:
    return {"method": method, **({"path": file} if method == "file" else {})}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("dense", "probmask", "magnitude")])
def test_all_of_tost_with_every_other_mask_method_survives_a_kill(method: str, mask_file: str, tmp_path: Path) -> None:
    """dense, probmask and magnitude: tests/test_launcher_tweaks.py, on 2 ranks."""
    config = configured(
        RESNET, mask=mask_of(method, mask_file), train={"epochs": 1},
        checkpoint={"every_steps": 2}, tost={**TOST_PRESETS["all"], "ghost_skip_fraction": 0.9, "lrsi_steps": 2},
    )  # fmt: skip
    whole = run_distributed(complete, 1, str(tmp_path / "whole"), config)[0]
    kill_step = 7 if method == "lth" else 3  # in the second round of lth
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_distributed(complete, 1, str(tmp_path / "killed"), config, kill_step)
    resumed = run_distributed(complete, 1, str(tmp_path / "killed"), config)[0]
    assert resumed.resumed_at in (kill_step - 1, kill_step - 3)
    assert resumed.digest == whole.digest
    plain = fresh(config)
    assert list(resumed.weights) == list(plain.state_dict())
    prunable = sum(m.numel() for m in resumed.masks.values())
    assert prunable == sum(w.numel() for w in prunable_weights(plain).values()), "ghosts are counted in the density"
    a_result = method == "file" or settings_of(method).decided_by
    assert a_result or resumed.kept == kept_count(0.1, prunable)


ALONE = {
    "ghost_skip": {"tost/alpha"}, "ghost_swish": {"tost/beta", "tost/soft"}, "label_smoothing": set[str](),
    "lrsi": {f"lrsi/{name}" for name in ("gradient_norm_first", "gradient_norm_last", "factor_min", "factor_max")},
}  # fmt: skip
"""Tweak -> what it logs."""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, mask_file: str) -> Callable[[str], tuple[RunConfig, str]]:
    """method -> its configuration with one epoch, and the digest of a run without any tweak, made once."""
    made: dict[str, tuple[RunConfig, str]] = {}

    def get(method: str) -> tuple[RunConfig, str]:
        if method not in made:
            config = configured(RESNET, mask=mask_of(method, mask_file), train={"epochs": 1})
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
    config = configured(config, tost={tweak: TOST_PRESETS["all"][tweak], "lrsi_steps": 2})
    outcome = run_distributed(complete, 1, str(tmp_path), config)[0]
    assert outcome.digest != plain, "it changed nothing"
    fresh(config).load_state_dict(outcome.weights, strict=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for logged in ({key for line in lines for key in line}, set(events.Tags()["scalars"])):
        assert {key for key in logged if key.startswith(("tost/", "lrsi/")) and "lrsi/loss" not in key} == ALONE[tweak]


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
