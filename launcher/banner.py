"""What does a run say of itself before its first step: network, data, ranks, how long, how large, and where?"""

from __future__ import annotations

from ghostmask.engine.checkpoint.entries import checkpoint_entries
from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.hooks import Hook
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World
from ghostmask.launcher.run import Run
from ghostmask.launcher.settings import run_folder


def banner(run: Run) -> str:
    """Two columns to print. The run need not be `opened`: a dry run shows the same."""
    config, data, world = run.config, run.data, run.world
    parameters = sum(p.numel() for p in run.net.parameters())
    weights = run.method.weights.values()
    prunable = sum(w.numel() for w in weights)
    phases = [f"{p.name} {p.epochs} epochs, {p.epochs * p.steps_per_epoch:,} steps" for p in run.phases if p.epochs]
    density = getattr(config.mask, "density", None)
    target = "" if density is None else f" at density {density:g}"
    rows = [
        ("network", f"{config.model.name}, {parameters:,} parameters, {prunable:,} prunable in {len(weights)} tensors"),
        ("mask", f"{config.mask.method}{target}"),
        ("data", f"{config.data.dataset}: {data.num_train:,} + {data.num_eval:,} images, {data.num_classes} classes"),
        ("batch", _batch(run)),
        ("ranks", f"{world.size} x {_device(world)}, {config.train.precision}, ZeRO stage {config.train.zero_stage}"),
        ("length", f"{'; '.join(phases) or 'no phase trains'}; {data.steps_per_epoch:,} steps an epoch"),
        ("folder", str(run_folder(config))),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def checkpoint_bytes(trainer: Trainer) -> int:
    """Collective: of all ranks' files of one checkpoint together."""
    entries = checkpoint_entries(
        trainer.model, trainer.sharded.optimizer, trainer.statistics, trainer.task.hooks
    )  # fmt: skip
    pieces = sum(e.tensor.nbytes for e in entries.values() if isinstance(e, Piece))
    whole = sum(e.nbytes for e in entries.values() if not isinstance(e, Piece))
    return sum([whole, *trainer.world.all_gather_object(pieces)])


class SaysCheckpoints(Hook):
    """Once per process: how large its checkpoints are, which the first phase's state decides."""

    said = False

    def on_start(self, trainer: Trainer) -> None:
        if not self.said:
            self.said = True
            size, keep = checkpoint_bytes(trainer), trainer.saving.keep
            trainer.reporter.progress.message(
                f"checkpoints of {size / 1e6:,.1f} MB, {keep} kept, in {trainer.store.folder}"
            )


def _batch(run: Run) -> str:
    config = run.config
    samples = int(getattr(config.mask, "samples", 0))
    noise = (
        f", {samples} noise samples each (mask.samples), {config.noises} noise groups (mask.noises)" if samples else ""
    )
    return f"{config.data.batch_size} images in {config.train.replicas} parts (train.replicas){noise}"


def _device(world: World) -> str:
    if world.device.type != "cuda":
        return "CPU"
    import torch

    return torch.cuda.get_device_name(world.device)
