"""Runs with masks of blocks, kernels or channels: the same on any ranks, after a kill, and in what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, Outcome, complete, configured, memory_run
from torch import Tensor

from ghostmask.engine.errors import InputError
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.settings import from_dict, settings_of, to_dict
from ghostmask.launcher.train import finish
from ghostmask.masks.registry import METHODS
from ghostmask.masks.settings import Ranked
from ghostmask.models.build import build_model
from ghostmask.models.flops import uses_of

SHORT = configured(
    CONFIG, model={"name": "digits_resnet"}, train={"epochs": 2}, finetune={"epochs": 1}, mask={"method": "magnitude"}
)
"""8 steps of the main phase, 4 of fine-tuning; a checkpoint every 3 steps and at the end of epochs."""
RANKED = [name for name in METHODS if issubclass(settings_of(name), Ranked)]

CASES: dict[str, dict[str, Any]] = {
    "gmp channel": {"method": "gmp", "granularity": "channel", "density": 0.3},
    "lth kernel": {"method": "lth", "granularity": "kernel", "round_fraction": 0.7},
    "snip 2:4": {"method": "snip", "granularity": "2:4", "density": 0.5},
    "rigl 2:4": {"method": "rigl", "granularity": "2:4", "density": 0.5},
    "set kernel": {"method": "set", "granularity": "kernel"},
    "random 2:4": {"method": "random", "granularity": "2:4", "density": 0.5},
    "random kernel": {"method": "random", "granularity": "kernel", "allocation": "uniform"},
    "st3 2:4": {"method": "st3", "granularity": "2:4", "density": 0.5},
    "feather 2:4": {"method": "feather", "granularity": "2:4", "density": 0.5},
    "synflow channel flops": {"method": "synflow", "granularity": "channel", "budget": "flops", "density": 0.3},
    "probmask 2:4": {"method": "probmask", "granularity": "2:4", "density": 0.5},
    "probmask channel": {"method": "probmask", "granularity": "channel", "density": 0.3, "noises": 2},
    "probmask kernel": {"method": "probmask", "granularity": "kernel", "density": 0.3, "noises": 2},
    "probmask flops": {"method": "probmask", "budget": "flops", "density": 0.3},
    "magnitude flops": {"method": "magnitude", "budget": "flops"},
}


def config_of(name: str) -> RunConfig:
    return configured(SHORT, mask=dict(CASES[name]))


def spent(masks: dict[str, Tensor], flops: bool) -> float:
    """The share of the weights, or of their multiplications, that masks keep."""
    net = build_model(SHORT.model, 4, MemoryData.image_shape, seed=3)
    uses = uses_of(net, MemoryData.image_shape) if flops else dict.fromkeys(masks, 1)
    return sum(int(m.sum()) * uses[n] for n, m in masks.items()) / sum(m.numel() * uses[n] for n, m in masks.items())


def one(outcomes: list[Outcome]) -> Outcome:
    assert len({o.digest for o in outcomes}) == 1
    return outcomes[0]


@pytest.mark.parametrize("name", CASES)
def test_a_run_ends_within_its_budget_and_is_the_same_on_other_ranks(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    alone = one(run_distributed(complete, 1, str(tmp_path / "1"), config))
    density: float = config.mask.density  # type: ignore[attr-defined]
    share = spent(alone.masks, "flops" in name)
    if "2:4" in name:
        for n, mask in alone.masks.items():
            if mask.shape[1] % 4 == 0:
                assert bool((mask.reshape(len(mask), -1, 4, mask.shape[2:].numel()).sum(2) == 2).all()), n
    else:
        assert density - 0.02 < share <= density + 1e-6
    ranks = 4 if "channel" in name or name == "probmask kernel" else 2
    assert one(run_distributed(complete, ranks, str(tmp_path / "other"), config)).digest == alone.digest


@pytest.mark.parametrize("name", ["gmp channel", "probmask channel", "probmask kernel", "rigl 2:4", "st3 2:4"])
def test_a_killed_run_with_units_ends_with_the_same_bits_on_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    whole = one(run_distributed(complete, 2, str(tmp_path / "whole"), config))
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_distributed(complete, 2, str(tmp_path / "killed"), config, 5)
    resumed = one(run_distributed(complete, 4, str(tmp_path / "killed"), config))
    assert resumed.resumed_at in (3, 4)
    assert resumed.digest == whole.digest


def exported(world: World, folder: str, config: RunConfig) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """The summary, the exported state, and by how much logits changed when removed channels were silenced."""
    run, saved = memory_run(world, Path(folder), config)
    run.execute(saved)
    for n, mask in run.masks().items():
        run.net.get_parameter(n).data.masked_fill_(~mask, 0.0)
    run.net.eval()
    images = torch.randn(9, *MemoryData.image_shape, generator=torch.Generator().manual_seed(0))
    before = run.net(images)
    finish(run, Path(folder) / "export", Path(folder))
    changed = float((run.net(images) - before).detach().abs().max())
    summary = json.loads((Path(folder) / "export" / "summary.json").read_text())
    state = {n: t.detach().clone() for n, t in run.net.state_dict().items()}
    run.close()
    return summary, state, changed


def test_the_export_counts_removed_channels_and_leaves_nothing_of_them(tmp_path: Path) -> None:
    config = configured(SHORT, mask={**CASES["gmp channel"], "method": "magnitude"})
    ((summary, state, changed),) = run_distributed(exported, 1, str(tmp_path), config)
    assert changed == 0
    assert sum(layer["channels_removed"] for layer in summary["layers"]) > 50
    for layer in summary["layers"]:
        if layer["name"] == "fc.weight":
            continue
        gone = ~state[layer["name"]].flatten(1).any(1)
        assert int(gone.sum()) == layer["channels_removed"]
        norm = layer["name"].replace("conv", "bn").replace("downsample.0", "downsample.1").removesuffix(".weight")
        for key, value in (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            assert bool((state[f"{norm}.{key}"][gone] == value).all())
        assert bool((state[f"{norm}.bias"][~gone] != 0).all())


def says(world: World, folder: str, config: RunConfig) -> list[str]:
    run, saved = memory_run(world, Path(folder), config)
    said: list[str] = []
    run.reporter.progress.message = said.append  # type: ignore[method-assign]
    run.execute(saved)
    run.close()
    return said


def test_a_run_says_how_many_channels_or_kernels_are_gone(tmp_path: Path) -> None:
    for granularity, total in (("channel", 650), ("kernel", 41_000)):
        config = configured(SHORT, mask={"method": "snip", "granularity": granularity, "density": 0.3})
        (said,) = run_distributed(says, 1, str(tmp_path / granularity), config)
        (line,) = [s for s in said if "removed" in s]
        removed, _, of = line.removeprefix("mask: ").replace(",", "").split()[:3]
        assert line.endswith(f"{granularity}s removed")
        assert 0 < int(removed) < int(of)
        assert total * 0.9 < int(of) < total * 1.1


@pytest.mark.parametrize("method", RANKED)
def test_every_method_that_ranks_takes_a_granularity_and_keeps_to_it_or_says_what_fits(
    method: str, tmp_path: Path
) -> None:
    config = configured(SHORT, mask={"method": method, "granularity": "channel", "density": 0.4})
    assert from_dict(to_dict(config)) == config
    masks = one(run_distributed(complete, 1, str(tmp_path), config)).masks
    for mask in masks.values():
        whole = mask.reshape(*mask.shape[:2], -1)
        assert torch.equal(whole.any(2), whole.all(2))
        rows, columns = whole.any(2).any(1), whole.any(2).any(0)
        assert torch.equal(whole.any(2), rows[:, None] & columns[None, :])
    stage = [masks[f"layer2.0.{n}.weight"].flatten(1).any(1) for n in ("conv2", "downsample.0")]
    assert torch.equal(*stage) or not all(bool(rows.any()) for rows in stage), "added channels went apart"
    assert 0.37 < spent(masks, False) <= 0.4 + 1e-6


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"granularity": "2:4", "final": "sample"}, r"mask\.final = 'sample': .*use topk"),
        ({"granularity": "channel", "constraint": "layerwise"}, r"mask\.constraint = 'layerwise': .*use global"),
    ],
)
def test_what_probabilities_cannot_be_held_to_is_refused_with_what_fits(values: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings_of("probmask")(method="probmask", **values)
