"""What a run shows while it trains: the loop's numbers and the hooks', as progress, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ghostmask.engine.evaluation import Score
from ghostmask.engine.metrics import Counts, MetricWriter, Tag
from ghostmask.engine.progress import Progress
from ghostmask.engine.sharding.optimizer import ShardedOptimizer
from ghostmask.engine.world import World

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer


class Reporter:
    """Collects and writes the numbers of a run; does nothing visible on ranks other than 0.

    data_wait_s, checkpoint_stall_s: seconds since the last report that the loop waited for data, for a save.
    """

    def __init__(self, writer: MetricWriter, progress: Progress, world: World) -> None:
        self.writer, self.progress, self.world = writer, progress, world
        self.data_wait_s = 0.0
        self.checkpoint_stall_s = 0.0
        self.images_per_s = 0.0
        self._images, self._seconds = 0, 0.0
        self._loss, self._hits, self._steps = 0.0, (0.0, 0.0, 0.0), 0
        self._since = perf_counter()

    @property
    def mean_images_per_s(self) -> float:
        """Images per second of all ranks over the steps of this process, evaluations left out; 0 before the first."""
        return self._images / self._seconds if self._seconds else 0.0

    def close(self) -> None:
        """Write out what is buffered and give the terminal back."""
        self.progress.close()
        self.writer.close()

    def restart_clock(self) -> None:
        """Forget the time since the last report: what follows is training again."""
        self._since = perf_counter()
        self.data_wait_s = self.checkpoint_stall_s = 0.0

    def step(self, trainer: Trainer, loss: float, hits: Sequence[float]) -> None:
        """Collective where a hook's scalars are: count a step, and report every train.log_every of them. hits: of all
        images and noise samples of the step, as `evaluation.hits`."""
        correct, in_five, ranked = (total + more for total, more in zip(self._hits, hits, strict=True))
        self._loss, self._hits, self._steps = self._loss + loss, (correct, in_five, ranked), self._steps + 1
        position = trainer.position
        if position.step % trainer.config.log_every and position.step_in_epoch:
            return
        seconds = max(perf_counter() - self._since, 1e-9)
        self.images_per_s = self._steps * position.batch_size / seconds
        self._images, self._seconds = self._images + self._steps * position.batch_size, self._seconds + seconds
        values: dict[str, float] = {
            "train/loss": self._loss / self._steps,
            "train/accuracy": correct / (self._steps * position.batch_size * trainer.task.passes),
            **({"train/top5": in_five / ranked} if ranked else {}),
            "speed/images_per_s": self.images_per_s,
            "speed/data_wait_fraction": min(1.0, self.data_wait_s / seconds),
            "speed/checkpoint_stall_fraction": min(1.0, self.checkpoint_stall_s / seconds),
            "memory/peak_bytes": float(peak_memory_bytes(self.world.device)),
        }
        values.update(_optimizer_numbers(trainer.sharded.optimizer))
        for hook in trainer.task.hooks:
            values.update(_numbers(hook.scalars(trainer)))
        epoch = (position.step - 1) // position.steps_per_epoch
        self.writer.scalars(
            position.step, values, phase=position.phase, epoch=epoch, samples=position.samples,
            total_steps=self.progress.total_steps,
        )  # fmt: skip
        self.progress.update(position.step, _line(trainer, epoch, values))
        self._loss, self._hits, self._steps = 0.0, (0.0, 0.0, 0.0), 0
        self.restart_clock()

    def epoch(self, trainer: Trainer, evaluation: Score | None) -> None:
        """Report the end of an epoch: evaluation, per-layer numbers and histograms of the hooks."""
        position = trainer.position
        values: dict[str, float] = {}
        histograms: dict[str, Tensor | Counts] = {}
        if evaluation is not None:
            values = {"eval/accuracy": evaluation.accuracy, "eval/loss": evaluation.loss}
            values |= {} if evaluation.top5 is None else {"eval/top5": evaluation.top5}
        for hook in trainer.task.hooks:
            values.update(_numbers(hook.epoch_scalars(trainer)))
            histograms.update(hook.histograms(trainer))
        epoch = position.epoch - 1
        tags: dict[str, Tag] = {"phase": position.phase, "epoch": epoch, "samples": position.samples}
        self.writer.histograms(position.step, histograms, **tags)
        if values:
            self.writer.scalars(position.step, values, **tags)
        if evaluation is not None:
            scored = f"test accuracy {evaluation.text}, test loss {evaluation.loss:.4f}"
            place = f"{epoch - trainer.phase.first_epoch + 1}/{trainer.phase.epochs}"
            self.progress.message(f"{position.phase} epoch {place}: {scored}")
        self.writer.flush()
        self.restart_clock()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on a CUDA device, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _numbers(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _optimizer_numbers(optimizer: ShardedOptimizer) -> dict[str, float]:
    """Learning rate and gradient norm of every trained state tensor, and what clipping left of the last update."""
    values = {"gradient/clip_factor": 1.0 / float(optimizer.divisor)}
    for settings, group in zip(optimizer.param_groups, optimizer.groups, strict=True):
        for name in group.reparametrization.rules:
            values[f"lr/{group.name}.{name}"] = settings["lr"] * group.reparametrization.rates.get(name, 1.0)
    return values | {f"gradient/{name}": float(norm) for name, norm in optimizer.norms.items()}


def _line(trainer: Trainer, epoch: int, values: Mapping[str, float]) -> dict[str, float | str]:
    fields: dict[str, float | str] = {
        "phase": trainer.phase.name,
        "epoch": f"{epoch - trainer.phase.first_epoch + 1}/{trainer.phase.epochs}",
        "loss": values["train/loss"],
        "accuracy": values["train/accuracy"],
    }
    for hook in trainer.task.hooks:
        if hook.shown:
            fields[hook.shown.rpartition("/")[2]] = values[hook.shown]
    fields["images/s"] = values["speed/images_per_s"]
    return fields
