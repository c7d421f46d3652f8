"""Do ToST's tweaks survive a kill in the middle of their schedules, at every ZeRO stage, and leave a plain network?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, complete, configured, memory_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional

from ghostmask.engine.checkpoint.dcp import IndexedReader
from ghostmask.engine.hooks import Hook
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World
from ghostmask.launcher.export import load_export
from ghostmask.launcher.train import finish
from ghostmask.masks.masked import present_masks
from ghostmask.models.build import build_model
from ghostmask.models.config import TOST_PRESETS, ModelConfig

TOST = configured(
    CONFIG, model={"name": "digits_resnet"},
    tost={**TOST_PRESETS["all"], "ghost_skip_fraction": 0.7, "swish_fraction": 0.6, "lrsi_steps": 3},
)  # fmt: skip
"""12 steps of the main phase: ReLU from step 8 on, no ghosts from step 9 on; checkpoints at 3, 4, 6, 8, 9, 12, ..."""


@pytest.mark.parametrize(("method", "stage"), [("dense", 0), ("probmask", 2), ("magnitude", 1)])
def test_a_run_killed_during_and_after_the_schedules_ends_bit_identical(
    method: str, stage: int, tmp_path: Path
) -> None:
    """Started on 2 ranks, gone on with on 1 (stage 2, which sums in another order there: on 2), finished on 2."""
    config = configured(TOST, mask={"method": method}, train={"zero_stage": stage})
    whole = run_distributed(complete, 2, str(tmp_path / "whole"), config)
    assert len({o.digest for o in whole}) == 1
    for size, kill_step in ((2, 7), (2 if stage == 2 else 1, 11)):
        with pytest.raises(RuntimeError, match="died with exit code -9"):
            run_distributed(complete, size, str(tmp_path / "killed"), config, kill_step)
    outcomes = run_distributed(complete, 2, str(tmp_path / "killed"), config)
    assert outcomes[0].resumed_at in (8, 9), "the second kill came after the ghosts were gone, or nothing was saved"
    assert [o.digest for o in outcomes] == [o.digest for o in whole]


def inspect(world: World, folder: str, config: Any) -> dict[str, Any]:
    """Run to the end and export; what the main phase looked like on the way."""
    data = MemoryData(world)
    run, saved = memory_run(world, Path(folder), config, data)
    start = {n: t.clone() for n, t in run.net.state_dict().items()}
    watch = Watch(run.net)
    run.hooks = (watch,)
    run.execute(saved)
    plain = type(watch).names_of(run.net)
    finish(run, Path(folder) / "export", Path(folder))
    images = data.images[data.num_train :]
    exported = build_model(ModelConfig("digits_resnet"), 4, data.image_shape, seed=99)
    exported.load_state_dict(load_export(Path(folder) / "export" / "model.safetensors"), strict=True)
    with torch.no_grad():
        logits = exported.eval()(images)
        same = torch.equal(logits, run.net.eval()(images))
        loss = float(functional.cross_entropy(logits, data.labels[data.num_train :]))
    run.close()
    ratios = {n: watch.start[n] / start[n] for n, _ in run.net.named_parameters() if bool((start[n] != 0).all())}
    return {
        "plain": plain, "same": same, "loss": loss, "evaluated": watch.loss, "ratios": ratios,
        "ghosts": watch.ghosts, "soft": watch.soft, "hooks": sum(len(m._forward_hooks) for m in run.net.modules()),
    }  # fmt: skip


class Watch(Hook):
    """Runs after ToST's hooks: the weights that the first step starts from, what is there after each step."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.start = net, dict[str, Tensor]()
        self.ghosts: list[tuple[int, int, int]] = []
        self.soft: list[int] = []
        self.loss = 0.0

    @staticmethod
    def names_of(net: nn.Module) -> list[tuple[str, str]]:
        return [(name, type(module).__name__) for name, module in net.named_modules()]

    def on_start(self, trainer: Trainer) -> None:
        self.start = self.start or {n: p.detach().clone() for n, p in self.net.named_parameters()}

    def on_step_end(self, trainer: Trainer) -> None:
        named = sum("ghost" in n for n, _ in trainer.sharded.engine.module.named_parameters())
        optimizer = trainer.sharded.optimizer
        self.ghosts.append((named, len(optimizer.param_groups), len(optimizer.states)))
        self.soft.append(sum(kind == "SoftActivation" for _, kind in self.names_of(self.net)))

    def on_epoch_end(self, trainer: Trainer) -> None:
        assert trainer.evaluation is not None
        self.loss = trainer.evaluation.loss


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("tost")
    config = configured(TOST, mask={"method": "dense"}, tost={"label_smoothing": 0.3, "log_activation_sparsity": True},
                        checkpoint={"keep": 20})  # fmt: skip
    return run_distributed(inspect, 1, str(folder), config)[0], folder


def test_ghosts_and_soft_activations_are_there_and_then_gone_everywhere(inspected: Any) -> None:
    seen, folder = inspected
    assert [named > 0 for named, _, _ in seen["ghosts"]] == [True] * 8 + [False] * 4
    assert [(groups, states) for _, groups, states in seen["ghosts"]] == [(3, 3)] * 8 + [(2, 2)] * 4
    assert [count > 0 for count in seen["soft"]] == [True] * 7 + [False] * 5
    keys = {
        int(path.name.removeprefix("step-")): list(IndexedReader(path).read_metadata().state_dict_metadata)
        for path in (folder / "checkpoints").glob("step-*")
    }
    assert {3, 6, 9, 12} <= keys.keys()
    for step, names in keys.items():
        assert any("ghost" in name for name in names) == (step < 9), step


def test_the_exported_network_is_the_plain_one(inspected: Any) -> None:
    seen, _ = inspected
    net = build_model(ModelConfig("digits_resnet"), 4, (3, 8, 8), seed=0)
    assert seen["plain"] == Watch.names_of(net)
    assert seen["hooks"] == 0
    assert seen["same"]


def test_label_smoothing_is_not_in_the_evaluation_loss(inspected: Any) -> None:
    assert inspected[0]["evaluated"] == pytest.approx(inspected[0]["loss"], rel=1e-5)


def test_lrsi_multiplies_each_parameter_tensor_by_one_factor(inspected: Any) -> None:
    ratios = inspected[0]["ratios"]
    assert len(ratios) > 15
    for name, ratio in ratios.items():
        assert float(ratio.max() - ratio.min()) < 1e-6, name
        assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    assert sum(abs(float(r.mean()) - 1) > 1e-3 for r in ratios.values()) > 10


def test_the_schedules_are_in_the_metrics(inspected: Any) -> None:
    lines = [json.loads(line) for line in (inspected[1] / "metrics.jsonl").read_text().splitlines()]
    alphas = [line["tost/alpha"] for line in lines if "tost/alpha" in line]
    assert alphas == pytest.approx([max(0.0, 1 - step / 12 / 0.7) for step in range(1, 13)])
    betas = [line["tost/beta"] for line in lines if "tost/beta" in line]
    assert betas == pytest.approx([100 ** (step / 12 / 0.6) for step in range(1, 8)])
    assert [line["tost/soft"] for line in lines if "tost/soft" in line] == [1.0] * 7 + [0.0] * 5
    zeros = [line["zeros/layer1.0.relu.1"] for line in lines if "zeros/layer1.0.relu.1" in line]
    assert len(zeros) == 3
    assert zeros[0] < 0.01
    assert zeros[-1] > 0.1
    assert any("lrsi/gradient_norm_first" in line for line in lines)
    events = EventAccumulator(str(inspected[1]))
    events.Reload()
    assert [event.value for event in events.Scalars("tost/alpha")] == pytest.approx(alphas)
    assert [event.value for event in events.Scalars("tost/beta")] == pytest.approx(betas)
    assert {"tost/soft", "lrsi/gradient_norm_first"} <= set(events.Tags()["scalars"])


def mask_of_search(world: World, folder: str, config: Any) -> tuple[int, int, list[bool]]:
    """present_masks at the start of the search, and whether LRsI left the training mode as it was."""
    run, _ = memory_run(world, Path(folder), config)
    trainer = run.trainer(run.phases[0], 0)
    masks = present_masks(trainer.sharded.optimizer)
    for hook in trainer.task.hooks:
        hook.on_start(trainer)
    modes = [m.training for m in trainer.model.modules()]
    for hook in trainer.task.hooks:
        hook.on_stop(trainer)
    run.close()
    return sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values()), modes


def test_at_the_start_of_the_search_every_weight_is_in_the_mask(tmp_path: Path) -> None:
    config = configured(TOST, mask={"method": "probmask"})
    kept, prunable, modes = run_distributed(mask_of_search, 1, str(tmp_path), config)[0]
    assert kept == prunable > 300_000
    assert all(modes)
