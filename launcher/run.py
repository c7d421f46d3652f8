"""Wires a configuration into a run: data, network, mask method, and one trainer per phase."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ghostmask.data_pipelines.open import open_dataset
from ghostmask.engine.checkpoint.store import CheckpointStore, Saved
from ghostmask.engine.cores import cores_per_rank, usable_cores
from ghostmask.engine.data import DataPipeline, Parts
from ghostmask.engine.errors import InputError, RunStopped
from ghostmask.engine.hooks import Hook
from ghostmask.engine.loss import Loss
from ghostmask.engine.metrics import MetricWriter
from ghostmask.engine.position import Duration, Phase
from ghostmask.engine.profile import ProfileSteps
from ghostmask.engine.progress import Progress
from ghostmask.engine.reporting import Reporter
from ghostmask.engine.schedule import LearningRate
from ghostmask.engine.sharding.ranks import chosen_parts
from ghostmask.engine.sharding.replicas import Replicas, share
from ghostmask.engine.trainer import Task, Trainer
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.looking.at_the_end import SaysDiagnosis
from ghostmask.launcher.methods import method_of
from ghostmask.launcher.open_run import OpenRun
from ghostmask.launcher.record import versions
from ghostmask.launcher.settings import flat, to_dict, to_yaml
from ghostmask.launcher.tweaks import with_tweaks
from ghostmask.launcher.values import as_text
from ghostmask.masks.masked import present_masks
from ghostmask.masks.method import FINETUNE, MaskMethod, Recipe
from ghostmask.models.build import build_model, check_part, check_side
from ghostmask.models.flops import uses_of


@dataclass
class Run:
    """The parts of one run on this rank. Built by `assemble`, driven by `execute`."""

    config: RunConfig
    world: World
    shares: Shares
    data: DataPipeline
    net: nn.Module
    method: MaskMethod
    phases: list[Phase]
    store: CheckpointStore
    reporter: Reporter
    hooks: tuple[Hook, ...] = ()
    """More hooks for every phase, after the method's own."""
    recipe: tuple[Hook, ...] = ()
    """What the recipe does to batches (launcher.recipe); before all others."""
    opened: OpenRun | None = None
    """The folder that it owns; None for a run that is only looked at."""

    def execute(self, saved: Saved | None, *, train: bool = True) -> None:
        """Collective: go through the phases from `saved` on (None: from the start); without `train`, only settle the
        masks as if training ended at `saved`, or leave them as they are where every phase has a result."""
        if saved is None:
            self.world.pulse.enter("what the mask method starts from")
            self.method.prepare()
        names = [p.name for p in self.phases]
        for phase in self.phases[names.index(saved.meta["phase"]) if saved else 0 :]:
            here = saved is not None and saved.meta["phase"] == phase.name
            if not here:
                self.world.pulse.enter(
                    f"before phase {phase.name}: {self.config.mask.method} looks at network and data"
                )
                self.method.begin(phase, self.data, self.reporter.progress.message)
            trainer = self.trainer(phase, saved.step if saved is not None and here else phase.first_step)
            if saved is not None and here:
                trainer.resume(saved)
            if train:
                trainer.fit()
            else:
                trainer.statistics.average(self.world)
            if not train and self.method.every_phase_has_a_result:
                self.method.found = present_masks(trainer.sharded.optimizer)
                trainer.close()
                return
            self.world.pulse.enter(f"end of phase {phase.name}: its result")
            self.method.leave(trainer)
            trainer.close()

    def check_place(self, saved: Saved, what: str) -> None:
        """Raise InputError unless `saved` lies in a phase of this run; what: the argument that named it."""
        phase = next((p for p in self.phases if p.name == saved.meta["phase"]), None)
        if phase is None or not phase.first_step <= saved.step <= phase.end_step:
            here = ", ".join(f"{p.name}: steps {p.first_step} to {p.end_step}" for p in self.phases)
            raise InputError(
                f"{what}: step {saved.step} of phase {saved.meta['phase']} does not exist in this run ({here}); give "
                "settings with which it does"
            )

    def masks(self) -> dict[str, Tensor]:
        """Weight name -> bool tensor, equal on every rank; empty for a dense run."""
        return dict(self.method.found)

    @contextmanager
    def closing(self) -> Iterator[Run]:
        """Collective: close at the end, also of a run that was stopped, which all ranks are at the same step.

        After any other exception the peers are elsewhere and cannot be waited for: this rank just ends. So it is after
        wrong input, which one rank's share of the data alone may show.
        """
        try:
            yield self
        except (RunStopped, InputError) as error:
            if self.world.size == 1 or isinstance(error, RunStopped):
                self.close()
            raise
        self.close()

    def close(self) -> None:
        """Collective: finish the save under way, stop loaders and writers."""
        self.store.close()
        self.reporter.close()
        self.data.close()
        if self.opened is not None:
            self.opened.release()

    def trainer(self, phase: Phase, step: int) -> Trainer:
        """Collective: the trainer of a phase that starts, or goes on, at `step` of the run."""
        config = self.config
        setup = with_tweaks(self.method.enter(phase), config, self.net, phase, step)
        task = Task(
            phase, setup.model.to(self.world.device), [replace(g, average=self.decay(phase)) for g in setup.groups],
            learning_rate(config, phase), (*self.recipe, *setup.hooks, *self.hooks), setup.passes,
            Loss(config.tost.label_smoothing, config.distill.alpha, config.distill.temperature), config.optim.clip,
            config.seed,
        )  # fmt: skip
        meta = {"config": to_dict(self.config), "data": dict(self.data.identity), "versions": versions()}
        noisy = any(group.reparametrization.noisy for group in setup.groups)
        return Trainer(
            task, self.data, self.config.train, self.config.checkpoint, self.world,
            self.shares.noisy if noisy else self.shares.plain, self.store, self.reporter, meta,
        )  # fmt: skip

    def decay(self, phase: Phase) -> float:
        """ema.decay in phases that end with a network that is delivered, 0 in others."""
        last = [*self.phases[:1], *(p for p in self.phases if p.epochs > 0)][-1]
        return self.config.ema.decay if self.method.every_phase_has_a_result or phase == last else 0.0


@dataclass(frozen=True)
class Shares:
    """This rank's share of a step: in phases with noise (mask.noises groups) and in others (one group of all ranks)."""

    noisy: Replicas
    plain: Replicas

    @classmethod
    def of(cls, config: RunConfig, world: World) -> Shares:
        """Collective. config.train.replicas is settled (see `settle`). Raises InputError where the ranks do not fit."""
        plain = share(world, config.train.replicas)
        noises = config.noises
        return cls(plain if noises == 1 else share(world, config.train.replicas, noises), plain)


def settle(config: RunConfig, world: World) -> RunConfig:
    """`config` with train.replicas chosen for the ranks there are, where it says nothing of it."""
    if config.train.replicas:
        return config
    parts = chosen_parts(config.data.batch_size, config.noises, world.size, world.device.type)
    return replace(config, train=replace(config.train, replicas=parts))


def open_data(config: RunConfig, world: World, parts: Parts | None = None) -> DataPipeline:
    """The run's data on this rank, whose torch threads are set on the way. Raises InputError.

    parts: of the training batches; None where only evaluation images are read.
    """
    world.pulse.enter(f"opening the data in {config.data.root}")
    torch.set_num_threads(usable_threads(config.train.threads))
    return open_dataset(config.data, config.seed, world, parts or Parts())


def build_method(config: RunConfig, world: World, data: DataPipeline) -> MaskMethod:
    """The network, from its seed, on this rank's device, and the mask method around it. Raises InputError."""
    world.pulse.enter(f"building the network {config.model.name}")
    net = build_model(config.model, data.num_classes, data.image_shape, config.seed)
    for field in ("eval_size", "start_size"):
        if (side := getattr(config.data, field)) not in (0, data.image_shape[1]):
            check_side(net, data.image_shape, f"data.{field}", side)
    check_part(net, data.image_shape, config.data.batch_size, config.train.replicas)
    net.to(world.device)
    bf16 = config.train.precision == "bf16" and config.train.zero_stage > 0
    optim = replace(config.optim, lr=config.optim.lr * config.lr_scale)
    finetune = replace(config.finetune, lr=config.finetune.lr * config.lr_scale)
    uses = partial(uses_of, net, data.image_shape)
    recipe = Recipe(optim, finetune, config.train.epochs, config.seed, bf16, data.image_shape, uses)
    return method_of(config.mask.method)(config.mask, net, recipe, world)


def assemble(
    config: RunConfig, folder: Path, data: DataPipeline, method: MaskMethod, opened: OpenRun, shares: Shares,
    recipe: tuple[Hook, ...] = (),
) -> Run:  # fmt: skip
    """The run in `folder`, whose writers go on after the checkpoint there; nothing is trained yet. recipe: see Run."""
    step = opened.saved.step if opened.saved else None
    writer = MetricWriter(folder, method.world, step, opened.holds)
    plain = {name: v if isinstance(v, bool | int | float) else as_text(v) for name, v in flat(config).items()}
    writer.settings(plain, to_yaml(config))
    hooks = (*((ProfileSteps(folder / "profile"),) if config.train.profile else ()), SaysDiagnosis(folder))
    return replace(_run(config, data, method, opened.store, shares, writer, hooks), opened=opened, recipe=recipe)


def assemble_to_read(
    config: RunConfig, data: DataPipeline, method: MaskMethod, store: CheckpointStore, shares: Shares
) -> Run:
    """A run to be looked at: it writes no metrics."""
    return _run(config, data, method, store, shares, MetricWriter(None, method.world, None), ())


def _run(
    config: RunConfig, data: DataPipeline, method: MaskMethod, store: CheckpointStore, shares: Shares,
    writer: MetricWriter, hooks: tuple[Hook, ...],
) -> Run:  # fmt: skip
    phases = plan(method, data.steps_per_epoch)
    reporter = Reporter(writer, Progress(method.world, phases[-1].end_step), method.world)
    return Run(config, method.world, shares, data, method.net, method, phases, store, reporter, hooks)


def plan(method: MaskMethod, steps_per_epoch: int) -> list[Phase]:
    """The method's phases, one after the other on the run's one count of epochs and steps."""
    phases, first = [], 0
    for name, epochs in method.phases():
        phases.append(Phase(name, first, epochs, steps_per_epoch))
        first += epochs
    return phases


def learning_rate(config: RunConfig, phase: Phase) -> LearningRate:
    """The schedule of a phase: the main recipe's with its warm-up, anew in every round of lth, or fine-tuning's."""
    total = phase.epochs * phase.steps_per_epoch
    if phase.name == FINETUNE:
        return LearningRate(config.finetune.schedule, total)
    optim = config.optim
    warmup = Duration.parse(optim.warmup).steps(phase.steps_per_epoch)
    milestones = tuple(m * phase.steps_per_epoch for m in optim.milestones)
    return LearningRate(optim.schedule, total, warmup, milestones, optim.gamma)


def usable_threads(threads: int) -> int:
    """train.threads; 0 is this rank's share of the cores. More than there are would wait for each other, spinning, for
    minutes a step: then as many as there are, with a warning."""
    cores = usable_cores()
    if threads > cores:
        warnings.warn(f"train.threads = {threads}: this machine has {cores} cores, {cores} are used", stacklevel=2)
    return min(threads, cores) or cores_per_rank()
