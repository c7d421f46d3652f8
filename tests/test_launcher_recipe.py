"""Do the options of the recipe act in a run as they say, through kills, and is what makes no sense refused?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, Outcome, complete, configured, memory_run
from safetensors.torch import save_file
from torch import Tensor, nn

from ghostmask.engine.batchnorm import statistics
from ghostmask.engine.data import PartBatch
from ghostmask.engine.distill import Distillation
from ghostmask.engine.errors import InputError
from ghostmask.engine.hooks import Hook
from ghostmask.engine.mixing import Mixing
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World, single
from ghostmask.launcher.arguments import check_networks
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import use
from ghostmask.launcher.folder import networks
from ghostmask.launcher.main import main
from ghostmask.launcher.open_run import open_owned
from ghostmask.launcher.recipe import recipe_hooks
from ghostmask.launcher.run import Shares, assemble, build_method, plan
from ghostmask.launcher.settings import load_config
from ghostmask.launcher.source import Source
from ghostmask.launcher.train import rates_text
from ghostmask.models.build import build_model

SHORT = configured(
    CONFIG, model={"name": "digits_resnet"}, mask={"method": "random"}, train={"epochs": 2},
    checkpoint={"every_steps": 0, "asynchronous": False},
)  # fmt: skip
"""8 steps under a random mask."""


class Watch(Hook):
    """What the average is to be made of: weights, mean statistics over the parts; and what was evaluated."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.rows: list[dict[str, Tensor]] = []
        self.evaluated: dict[str, Tensor] = {}

    def row(self, trainer: Trainer) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        optimizer = trainer.sharded.optimizer
        for state, part in zip(optimizer.states, optimizer.slices, strict=True):
            found |= {n: t.double().clone() for n, t in part.gathered(state["weight"]).items()}
        mean = torch.stack([s.double() for s in trainer.statistics._sets]).mean(0)
        buffers = statistics(self.net)
        pieces = torch.split(mean, [b.numel() for b in buffers.values()])
        return found | {n: p.view_as(b).clone() for (n, b), p in zip(buffers.items(), pieces, strict=True)}

    def on_start(self, trainer: Trainer) -> None:
        self.rows = [self.row(trainer)]

    def on_step_end(self, trainer: Trainer) -> None:
        self.rows.append(self.row(trainer))

    def on_epoch_end(self, trainer: Trainer) -> None:
        with trainer.evaluation_weights():
            self.evaluated = {n: t.clone() for n, t in self.net.state_dict().items()}
        before = self.rows[-1]["fc.weight"]
        optimizer = trainer.sharded.optimizer
        index = [g.name for g in optimizer.groups].index("prunable")
        now = optimizer.slices[index].gathered(optimizer.states[index]["weight"])["fc.weight"]
        assert torch.equal(now.double(), before), "an evaluation left the average in the weights that are trained"


def watched(world: World, folder: str, config: RunConfig) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], Any]:
    run, saved = memory_run(world, Path(folder), config)
    watch = Watch(run.net)
    run.hooks = (watch,)
    run.execute(saved)
    masks = run.masks()
    run.close()
    return watch.rows, watch.evaluated, ({n: t.clone() for n, t in run.net.state_dict().items()}, masks)


def test_the_average_of_weights_and_statistics_is_evaluated_and_delivered_under_the_mask(tmp_path: Path) -> None:
    config = configured(SHORT, ema={"decay": 0.7})
    ((rows, evaluated, (delivered, masks)),) = run_distributed(watched, 1, str(tmp_path / "a"), config)
    assert len(rows) == 9
    wanted = dict(rows[0])
    for number, row in enumerate(rows[1:]):
        kept = min(0.7, (1 + number) / (10 + number))
        wanted = {n: kept * wanted[n] + (1 - kept) * t for n, t in row.items()}
    for name, value in wanted.items():
        masked = torch.where(masks[name], value, 0.0) if name in masks else value
        torch.testing.assert_close(delivered[name].double(), masked, atol=2e-6, rtol=1e-5)
        assert torch.equal(delivered[name], evaluated[name]), name
    last = torch.where(masks["conv1.weight"], rows[-1]["conv1.weight"], 0.0)
    assert not torch.allclose(delivered["conv1.weight"].double(), last, atol=1e-5), "the last weights would do"
    ((raw, _, (without, _)),) = run_distributed(watched, 1, str(tmp_path / "b"), SHORT)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(rows, raw, strict=True) for n in a), "it changes the training"
    assert not torch.equal(without["fc.weight"], delivered["fc.weight"])


def watched_from(world: World, folder: str, source: str, config: RunConfig) -> tuple[int, Any, Any]:
    data, shares = MemoryData(world), Shares.of(config, world)
    data.parts = shares.plain.parts
    method = build_method(config, world, data)
    opened = open_owned(Path(folder), config, world, data, source=Source(Path(source), 6))
    run = assemble(config, Path(folder), data, method, opened, shares)
    watch = Watch(run.net)
    run.hooks = (watch,)
    run.execute(opened.saved)
    run.close()
    assert opened.saved is not None
    return opened.saved.step, watch.rows, {n: t.clone() for n, t in watch.evaluated.items()}


def test_a_run_from_one_without_an_average_begins_it_there(tmp_path: Path) -> None:
    saving = configured(SHORT, checkpoint={"every_steps": 3})
    run_distributed(complete, 1, str(tmp_path / "a"), saving)
    config = configured(saving, ema={"decay": 0.7})
    ((step, rows, evaluated),) = run_distributed(watched_from, 1, str(tmp_path / "b"), str(tmp_path / "a"), config)
    assert (step, len(rows)) == (6, 3)
    wanted = dict(rows[0])
    for number, row in enumerate(rows[1:], step):
        kept = min(0.7, (1 + number) / (10 + number))
        wanted = {n: kept * wanted[n] + (1 - kept) * t for n, t in row.items()}
    for name in ("fc.weight", "bn1.running_var"):
        found = evaluated[name].double()
        torch.testing.assert_close(torch.where(found != 0, wanted[name], 0.0), found, atol=2e-6, rtol=1e-5)


def averages(config: RunConfig) -> dict[str, list[float]]:
    """Phase -> the decays of its groups."""
    from ghostmask.launcher.run import Run

    world, data = single(), MemoryData(single())
    method = build_method(config, world, data)
    shares = Shares.of(config, world)
    phases = plan(method, data.steps_per_epoch)
    run = Run(config, world, shares, data, method.net, method, phases, None, None)  # type: ignore[arg-type]
    return {phase.name: [run.decay(phase)] for phase in run.phases}


def test_the_phase_that_is_delivered_is_averaged_and_no_other() -> None:
    on = {"ema": {"decay": 0.9}}
    assert averages(configured(CONFIG, **on)) == {"search": [0.0], "finetune": [0.9]}
    magnitude = configured(CONFIG, mask={"method": "magnitude"}, **on)
    assert averages(magnitude) == {"train": [0.0], "finetune": [0.9]}
    assert averages(configured(magnitude, finetune={"epochs": 0})) == {"train": [0.9], "finetune": [0.0]}
    assert set(map(tuple, averages(configured(CONFIG, mask={"method": "lth"}, **on)).values())) == {(0.9,)}


def teacher_file(path: Path, seed: int = 9, **changes: Any) -> nn.Module:
    net = build_model(replace(SHORT.model, **changes), 4, MemoryData.image_shape, seed=seed)
    save_file(net.state_dict(), path)
    return net


def everything(teacher: Path) -> RunConfig:
    return configured(
        SHORT, augment={"mixup": 0.3, "cutmix": 1.0}, ema={"decay": 0.8}, distill={"path": str(teacher)},
        checkpoint={"every_steps": 3},
    )  # fmt: skip


def test_a_run_that_is_killed_goes_on_to_the_same_bits_on_other_ranks_and_with_no_other_teacher(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher_file(path)
    config = everything(path)
    whole: Outcome = run_distributed(complete, 1, str(tmp_path / "whole"), config)[0]
    with pytest.raises(RuntimeError, match="died with exit code"):
        run_distributed(complete, 2, str(tmp_path / "killed"), config, 5)
    teacher_file(path, seed=10)
    with pytest.raises(RuntimeError, match=r"distill.path = .*: holds another network than the one that this run has"):
        run_distributed(complete, 1, str(tmp_path / "killed"), config)
    teacher_file(path)
    resumed: Outcome = run_distributed(complete, 4, str(tmp_path / "killed"), config)[0]
    assert resumed.resumed_at in (3, 4)
    assert resumed.digest == whole.digest


def hooks_of(config: RunConfig) -> tuple[Hook, ...]:
    return recipe_hooks(config, MemoryData(single()), single())


class Step:
    """What the hooks look at of a trainer."""

    class position:
        step = 4

    config = SHORT.train


def test_the_teacher_sees_the_mixed_images_once_per_part_and_stays_as_it_is(tmp_path: Path) -> None:
    net = teacher_file(tmp_path / "teacher.safetensors").eval()
    mixing, teaching = hooks_of(everything(tmp_path / "teacher.safetensors"))
    assert isinstance(mixing, Mixing)
    assert isinstance(teaching, Distillation)
    trainer: Any = Step()
    part = PartBatch(torch.randn(6, 3, 8, 8), torch.arange(6) % 4)
    mixed = mixing.on_part(trainer, 1, part)
    shown = teaching.on_part(trainer, 1, mixed)
    assert mixed.soft is not None
    assert shown.teacher is not None
    with torch.no_grad():
        torch.testing.assert_close(shown.teacher, net(mixed.images), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(shown.teacher, net(part.images), atol=1e-3)
    assert not shown.teacher.requires_grad
    assert not any(m.training for m in teaching.teacher.modules())


def test_a_teacher_that_is_no_such_network_is_one_line(tmp_path: Path) -> None:
    other, missing = tmp_path / "other.safetensors", tmp_path / "missing.safetensors"
    save_file(build_model(SHORT.model, 10, MemoryData.image_shape, seed=9).state_dict(), other)
    for path, model, said in (
        (missing, "", "is missing; give a finished run's folder"),
        (other, "", "does not hold this network's weights"),
        (other, "resnet20", "does not hold this network's weights"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            hooks_of(configured(SHORT, distill={"path": str(path), "model": model}))
        assert str(caught.value).startswith("distill.path = ")
        assert "\n" not in str(caught.value)
    teacher_file(other, name="resnet20")
    (teaching,) = hooks_of(configured(SHORT, distill={"path": str(other), "model": "resnet20"}))
    assert isinstance(teaching, Distillation)


def test_the_teacher_s_network_is_looked_for_and_copied_like_the_run_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def net(num_classes): ...\n")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.yaml").write_text("model:\n  name: mine:net\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = ["digits_tost", f"distill.path={tmp_path / 'teacher'}"]
    assert networks(load_config(*given[:1], given[1:])) == {"digits_resnet", "mine:net"}
    here = ["--cluster", "local", "--tasks-per-node", "1"]
    copied: list[set[str]] = []

    def copy(folder: Path, models: set[str]) -> None:
        copied.append(set(models))
        raise InputError("no further")

    monkeypatch.setattr("ghostmask.launcher.cluster.submit.take_snapshot", copy)
    assert main(["submit", *given, f"run={tmp_path / 'run'}", *here]) == 2
    assert copied == [{"digits_resnet", "mine:net"}]
    (tmp_path / "teacher" / "config.yaml").write_text("model:\n  name: mine:other\n")
    with pytest.raises(InputError, match="mine:other"):
        check_networks(load_config(*given[:1], given[1:]))
    with pytest.raises(InputError, match=r"^distill\.model = 'resnet99' is not known"):
        check_config(load_config(given[0], [given[1], "distill.model=resnet99"]), world_size=1)


def test_parts_of_one_image_are_not_mixed() -> None:
    with pytest.raises(InputError, match=r"augment.cutmix = 1.0: each of 24 parts of the batch .* has one image"):
        hooks_of(configured(SHORT, augment={"cutmix": 1.0}, train={"replicas": 24}))


def test_rates_follow_the_batch_and_those_of_probabilities_do_not() -> None:
    data = MemoryData(single())
    for scale, factor in (("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)):
        config = configured(CONFIG, optim={"scale_lr": scale}, data={"batch_size": 1024})
        assert config.lr_scale == factor
        method = build_method(config, single(), data)
        search, finetune = (method.enter(phase) for phase in plan(method, 4))
        assert {g.lr for g in search.groups} == {0.02 * factor}
        assert {g.lr for g in finetune.groups} == {0.01 * factor}
        form = search.groups[0].reparametrization
        assert form.rates["probability"] * search.groups[0].lr == pytest.approx(0.03)
    assert (
        rates_text(config) == "learning rates for 1024 images (sqrt): optim.lr 0.02 -> 0.04, finetune.lr 0.01 -> 0.02"
    )


class Layouts(Hook):
    """Whether the first convolution is given channels_last images."""

    def __init__(self, net: nn.Module) -> None:
        self.seen: set[bool] = set()
        net.get_submodule("conv1").register_forward_pre_hook(self.look)

    def look(self, conv: nn.Module, inputs: tuple[Tensor]) -> None:
        if conv.training:
            self.seen.add(inputs[0].is_contiguous(memory_format=torch.channels_last))


def layouts(world: World, folder: str, config: RunConfig) -> set[bool]:
    run, saved = memory_run(world, Path(folder), config)
    hook = Layouts(run.net)
    run.execute(saved)
    run.close()
    return hook.seen


def test_channels_last_is_the_order_of_the_images_that_convolutions_get_mixed_or_not(tmp_path: Path) -> None:
    for channels_last in (True, False):
        config = configured(
            SHORT, train={"channels_last": channels_last, "epochs": 1}, augment={"mixup": 1.0, "mix_fraction": 0.5}
        )
        assert run_distributed(layouts, 1, str(tmp_path / str(channels_last)), config) == [{channels_last}]


def test_the_summary_says_what_whoever_uses_the_network_must_do_too() -> None:
    plain, both = use(SHORT), use(configured(SHORT, train={"eval_flip": True}, model={"blurpool": True}))
    assert (plain["mirrored"], plain["blurpool"]) == (False, False)
    assert (both["mirrored"], both["blurpool"]) == (True, True)
    assert plain.keys() == both.keys() > {"mean", "std", "classes"}
