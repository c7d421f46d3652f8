"""The training loop of one phase: batches in, steps, evaluations, checkpoints, until the phase's last epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ghostmask.engine.batchnorm import PartStatistics, reestimate, restored
from ghostmask.engine.checkpoint.entries import checkpoint_entries, is_average, restore
from ghostmask.engine.checkpoint.store import CheckpointStore, Saved
from ghostmask.engine.config import CheckpointConfig, TrainConfig
from ghostmask.engine.data import Batch, DataPipeline, PartBatch
from ghostmask.engine.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE, FROM_CHECKPOINT, RunStopped
from ghostmask.engine.evaluation import EvaluationStopped, Score, score
from ghostmask.engine.hooks import Hook
from ghostmask.engine.loss import Loss, LossModule
from ghostmask.engine.position import Phase, Position
from ghostmask.engine.precision import set_float32_precision
from ghostmask.engine.readback import Readback
from ghostmask.engine.reporting import Reporter
from ghostmask.engine.schedule import LearningRate
from ghostmask.engine.sharding.optimizer import Sampling
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.replicas import Replicas
from ghostmask.engine.sharding.zero import ShardedEngine, shard_model
from ghostmask.engine.signals import StopSignals
from ghostmask.engine.world import World

EVALUATION_BATCHES = 20
"""Training batches from which batch norm is estimated for evaluation weights that are not those trained with (fewer if
the epoch has fewer)."""


@dataclass(frozen=True)
class Task:
    """What one phase trains.

    model: images -> logits; passes: noise samples that the gradient of every part is averaged over (I), where a group's
    reparametrization is noisy; loss: what is minimised; clip: largest joint norm of the state's gradients, 0 = none;
    seed: of the noise.
    """

    phase: Phase
    model: nn.Module
    groups: list[ParameterGroup]
    learning_rate: LearningRate
    hooks: Sequence[Hook] = ()
    passes: int = 1
    loss: Loss = field(default_factory=Loss)
    clip: float = 0.0
    seed: int = 0

    @property
    def average(self) -> float:
        """Decay of the moving average that is delivered; 0: there is none."""
        return max((group.average for group in self.groups), default=0.0)


class Trainer:
    """Runs a Task on this rank's parts of the data. Every method is collective.

    position: where the run is; model: the network being trained; world: this rank among its peers.
    """

    def __init__(
        self, task: Task, data: DataPipeline, config: TrainConfig, saving: CheckpointConfig, world: World,
        replicas: Replicas, store: CheckpointStore, reporter: Reporter, run_meta: dict[str, Any],
    ) -> None:  # fmt: skip
        self.task, self.data, self.config, self.saving = task, data, config, saving
        self.world, self.replicas = world, replicas
        self.store, self.reporter, self.run_meta = store, reporter, run_meta
        self.model, self.phase = task.model, task.phase
        self.cycles = replicas.cycles(task.passes)
        self.microsteps = sum(len(cycle.parts) for cycle in self.cycles)
        self.position = Position(task.phase.name, task.phase.first_step, data.steps_per_epoch, data.batch_size)
        self.evaluation: Score | None = None
        set_float32_precision(config.precision)
        self.statistics = PartStatistics(task.model, replicas.parts, task.average)
        self.sharded = self._shard()
        self._saved_step, self._saved_at = -1, perf_counter()
        self._finite: Readback | None = None
        self._began = -1

    @property
    def num_updates(self) -> int:
        """Optimizer steps done in this phase."""
        return self.position.step - self.phase.first_step

    @property
    def done_fraction(self) -> float:
        """Share of this phase's optimizer steps that are done, in [0, 1]."""
        return self.num_updates / (self.phase.end_step - self.phase.first_step)

    def resume(self, saved: Saved) -> None:
        """Go on from a checkpoint of this phase, whatever its number of ranks and ZeRO stage were.

        One of another run may have been made without a moving average.
        """
        averages = self.task.average == 0 or any(map(is_average, self.store.names(saved)))
        restore(
            self.model, self.sharded.optimizer, self.statistics, self.task.hooks, saved.meta,
            lambda entries: self.store.load(saved, entries), averages=averages,
        )  # fmt: skip
        self.position = replace(self.position, step=saved.step)
        self._saved_step = saved.step
        for hook in self.task.hooks:
            if hook.name in saved.meta["hooks"]:
                hook.load_state_dict(saved.meta["hooks"][hook.name])

    def fit(self) -> None:
        """Train to the end of the phase. Raises RunStopped on a signal (after saving) or a non-finite loss."""
        try:
            with StopSignals() as signals:
                self.world.pulse.enter(f"start of phase {self.phase.name} at step {self.position.step}")
                for hook in self.task.hooks:
                    hook.on_start(self)
                self.reporter.restart_clock()
                self._began = self.position.step
                while self.position.step < self.phase.end_step:
                    self._run_epoch(signals)
                self._check_gradient()
                # Asked for after the last step's vote, during the evaluation: the phase's end is saved already.
                if float(self.world.all_reduce(self._flag(signals.requested != 0))) > 0:
                    self._stop()
        finally:
            for hook in self.task.hooks:
                hook.on_stop(self)

    def save(self) -> None:
        """Write a checkpoint of the present position, in the background if so configured."""
        if self._saved_step == self.position.step:
            return
        meta = {
            **self.run_meta,
            "phase": self.position.phase,
            "updates": self.sharded.optimizer.updates,
            "hooks": {h.name: h.state_dict() for h in self.task.hooks if h.name},
        }
        self._check_gradient()
        entries = checkpoint_entries(self.model, self.sharded.optimizer, self.statistics, self.task.hooks)
        start = perf_counter()
        self.world.pulse.enter(f"checkpoint of step {self.position.step}")
        self.reporter.writer.flush()  # what is logged up to a step is on disk before the step's checkpoint is
        self.store.save(self.position.step, entries, meta)
        self.reporter.checkpoint_stall_s += perf_counter() - start
        self._saved_step, self._saved_at = self.position.step, perf_counter()

    def evaluate(self, signals: StopSignals | None = None) -> Score:
        """Score, on the evaluation images, of the network that would be delivered now. Raises EvaluationStopped."""
        asked = None if signals is None else (lambda: signals.requested != 0)
        with self.evaluation_weights():
            return score(
                self.model, self.data.evaluate(), self.world, self.config.precision, flip=self.config.eval_flip,
                asked_to_stop=asked,
            )  # fmt: skip

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within, the model is in evaluation mode, with the weights that would be delivered now.

        Where these are not the ones trained with, batch norm's running statistics do not fit them (a network under the
        most probable mask can fall to chance): they are estimated on a few training batches, for as long.
        """
        optimizer = self.sharded.optimizer
        self._check_gradient()
        optimizer.eval()
        try:
            with restored(self.model):
                noisy = any(g.reparametrization.differs_in_evaluation for g in optimizer.groups)
                if optimizer.differs_in_evaluation and (not self.statistics.deliver() or noisy):
                    with closing(self.data.train(self.position.epoch)) as batches:
                        some = islice(batches, EVALUATION_BATCHES)
                        reestimate(self.model, some, self.replicas.parts, self.world, self.config.precision)
                self.model.eval()
                yield
        finally:
            self.model.train()
        optimizer.train()

    def release(self, names: set[str]) -> None:
        """Between steps: take the parameter groups `names` out of the optimizer, DeepSpeed and the checkpoints.

        The other groups keep every bit of their state, in a new DeepSpeed engine.
        """
        self.world.pulse.enter(f"parameter groups {', '.join(sorted(names))} leave at step {self.position.step}")
        before, parts = self.sharded.optimizer, self.statistics.entries()
        self.sharded.destroy()
        self.task = replace(self.task, groups=[g for g in self.task.groups if g.name not in names])
        self.forget_compiled()
        self.sharded = self._shard()
        self.sharded.optimizer.adopt(before)
        self.statistics = PartStatistics(self.model, self.replicas.parts, self.task.average)
        self.statistics.load(parts)

    def forget_compiled(self) -> None:
        """Compile anew what a changed module tree makes wrong: torch.compile does not look at hooks again."""
        if self.config.compile:
            torch._dynamo.reset()

    def close(self) -> None:
        """Collective: the model's parameters become plain ones, with the weights that are delivered; DeepSpeed's
        buffers are given up."""
        self.sharded.optimizer.give_back()
        self.statistics.deliver()
        self.sharded.destroy()

    def _shard(self) -> ShardedEngine:
        config, task = self.config, self.task
        samples, replicas = tuple(cycle.sample for cycle in self.cycles), self.replicas
        sampling = Sampling(task.seed, task.phase.first_step, samples, replicas.across, replicas.across_order)
        return shard_model(
            LossModule(task.model, task.loss, config.precision, compiled=config.compile),
            task.groups, self.replicas.inner, zero_stage=config.zero_stage, clip=task.clip,
            microsteps=len(self.cycles[0].parts), micro_batch=self.data.batch_size // self.replicas.parts.total,
            sampling=sampling, order=self.replicas.order,
        )  # fmt: skip

    def _run_epoch(self, signals: StopSignals) -> None:
        compiling = ", compiling the network" if self.config.compile and self.position.step == self._began else ""
        self.world.pulse.enter(f"start of epoch {self.position.epoch}{compiling}")
        self.model.train()
        for hook in self.task.hooks:
            hook.on_epoch_start(self)
        epoch = self.position.epoch
        with closing(self.data.train(epoch, self.position.step_in_epoch)) as batches:
            self._run_steps(self._timed(batches), epoch, signals)

    def _run_steps(self, batches: Iterator[Batch], epoch: int, signals: StopSignals) -> None:
        for batch in batches:
            asked, due = self.step(batch, signals)
            if self.position.step_in_epoch == 0:
                asked = self._end_epoch(epoch, signals, asked)
            if asked or due or self._epoch_save_due():
                self.save()
            if asked:
                self._stop()

    def _stop(self) -> None:
        saved = self.store.wait()
        what = f"saved at step {self.position.step}" if saved else "the save FAILED, an older checkpoint is left"
        again = "run the same command again, without --restart"
        raise RunStopped(f"stopped by a signal; {what}; {again}", EXIT_INTERRUPTED)

    def _flag(self, *values: bool) -> Tensor:
        # Pinned: a copy from ordinary memory would wait for everything that the GPU has been given to do.
        flags = torch.tensor([float(v) for v in values], pin_memory=self.world.device.type == "cuda")
        return flags.to(self.world.device, non_blocking=True)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = perf_counter()
            batch = next(batches, None)
            self.reporter.data_wait_s += perf_counter() - start
            if batch is None:
                return
            yield batch

    def step(self, batch: Batch, signals: StopSignals) -> tuple[bool, bool]:
        """Collective: one optimizer step; returns whether some rank was asked to stop, and whether a save is due."""
        for hook in self.task.hooks:
            hook.on_step_start(self)
        engine, optimizer = self.sharded.engine, self.sharded.optimizer
        factor = self.task.learning_rate.factor(self.num_updates)
        for settings, group in zip(optimizer.param_groups, optimizer.groups, strict=True):
            settings["lr"] = group.lr * factor
        parts = self._parts(batch)
        totals = torch.zeros(4, dtype=torch.float32, device=self.world.device)
        vote = None
        passes = [part for cycle in self.cycles for part in cycle.parts]
        for number, part in enumerate(passes, 1):
            self.statistics.enter(part)
            loss, hits = engine(*parts[part])
            self.statistics.leave(part)
            totals += torch.cat([loss.detach()[None], hits])
            if number == len(passes):
                vote = self._vote(totals, signals)
            engine.backward(loss)
            if vote is None:
                engine.step()
        assert vote is not None
        asked, due, loss_value, hits = self._decide(vote)
        self._check_gradient()
        engine.step()
        self.statistics.follow(optimizer.updates - 1)
        self._finite = Readback(optimizer.finite)
        if self.world.device.type == "cpu":
            self._check_gradient()
        self.position = replace(self.position, step=self.position.step + 1)
        self.world.pulse.step(f"step {self.position.step} of phase {self.phase.name}")
        for hook in self.task.hooks:
            hook.on_step_end(self)
        self.reporter.step(self, loss_value, hits)
        return asked, due

    def _parts(self, batch: Batch) -> list[PartBatch]:
        """This rank's parts of the batch, as the hooks want them, each where memory is aligned: convolutions of
        unaligned images round otherwise."""
        count = self.replicas.parts.count
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        parts = []
        for i, pair in enumerate(zip(batch.images.chunk(count), batch.labels.chunk(count), strict=True)):
            part = PartBatch(*pair)
            for hook in self.task.hooks:
                part = hook.on_part(self, self.replicas.parts.first + i, part)
            images = part.images.contiguous(memory_format=layout)
            parts.append(part._replace(images=images if images.data_ptr() % 64 == 0 else images.clone()))
        return parts

    def _check_gradient(self) -> None:
        """Stop where the last update's gradients were not finite; it has changed nothing.

        On CUDA this is asked a step later, or before anything is saved, so that nobody waits for backward to end.
        """
        finite, self._finite = self._finite, None
        if finite is not None and finite.values() != [1.0]:
            raise self._not_finite("gradient")

    def _vote(self, totals: Tensor, signals: StopSignals) -> Readback:
        """Start adding up, over the ranks, the step's loss and who wants to stop or save.

        Started before the last backward pass and read after it was launched, so that on a GPU the host waits for the
        forward pass only, while backward keeps the device busy.
        """
        minutes = (perf_counter() - self._saved_at) / 60
        due = self.saving.every_minutes > 0 and minutes >= self.saving.every_minutes and self.world.is_main
        wishes = self._flag(signals.requested != 0, due, self.store.lost)
        bad = (~torch.isfinite(totals[:1])).float()
        finite = torch.nan_to_num(totals, nan=0.0, posinf=0.0, neginf=0.0)
        return Readback(self.world.all_reduce(torch.cat([finite, bad, wishes])))

    def _decide(self, votes: Readback) -> tuple[bool, bool, float, list[float]]:
        loss, *hits, bad, asked, due, lost = votes.values()
        if lost:
            self.store.check_owner()
        if bad:
            raise self._not_finite("loss")
        every = self.saving.every_steps
        by_step = every > 0 and (self.position.step + 1) % every == 0
        return asked > 0, due > 0 or by_step, loss / (self.world.size * self.microsteps), hits

    def _not_finite(self, what: str) -> RunStopped:
        step = self.position.step
        return RunStopped(
            f"the {what} of step {step} (epoch {self.position.epoch}, phase {self.phase.name}) is not finite; stopped "
            f"before its optimizer update; with a lower rate or optim.clip, {FROM_CHECKPOINT}",
            EXIT_NON_FINITE,
        )

    def _end_epoch(self, epoch: int, signals: StopSignals, asked: bool) -> bool:
        """Evaluate and report; whether to stop, asked before or during the evaluation, which then has no result."""
        self.world.pulse.enter(f"end of epoch {epoch}")
        self.statistics.average(self.world)
        last = self.position.step == self.phase.end_step
        done = epoch + 1 - self.phase.first_epoch
        self.evaluation = None
        if not asked and (last or done % self.config.eval_every == 0):
            try:
                self.evaluation = self.evaluate(signals)
            except EvaluationStopped:
                asked = True
        for hook in self.task.hooks:
            hook.on_epoch_end(self)
        self.reporter.epoch(self, self.evaluation)
        return asked

    def _epoch_save_due(self) -> bool:
        if self.position.step_in_epoch:
            return False
        done = self.position.epoch - self.phase.first_epoch
        return done % self.saving.every_epochs == 0 or self.position.step == self.phase.end_step
