"""What does a step of ProbMask cost over a dense step of the same engine, and where does its time go?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import profile, record_function

from ghostmask.benchmarks.breakdown import CATEGORIES, seconds_by_category
from ghostmask.benchmarks.row import Row, more_per_second, share
from ghostmask.benchmarks.timing import Bench, Work, interleaved
from ghostmask.benchmarks.trainers import OneBatch, Workload, make_trainer, train_config, workload
from ghostmask.engine.data import Batch
from ghostmask.engine.profile import activities
from ghostmask.engine.signals import StopSignals
from ghostmask.engine.trainer import Trainer
from ghostmask.masks.methods.probmask import ProbMask
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig


def rows(bench: Bench) -> list[Row]:
    """Cases probmask_step_{overhead,default,added}, step_images_per_s, dense_images_per_s, step_where."""
    work = workload(bench)
    with TemporaryDirectory() as folder:
        config = train_config(bench)
        trainers = {m: make_trainer(m, work, bench.world, Path(folder) / m, config) for m in ("dense", "probmask")}
        default = ProbMask.Settings.samples
        trainers["default"] = make_trainer(
            "probmask", work, bench.world, Path(folder) / "default", config, samples=default
        )
        steps: dict[str, Work] = {name: _step_of(trainer, bench) for name, trainer in trainers.items()}
        cuda = bench.device.type == "cuda"
        steps["plain"] = plain_step(work, bench)
        repeats = 2 if bench.quick else 30 if cuda else 4
        seconds = interleaved(steps, repeats, bench.device, warm_up=10 if cuda else 1)
        where = {name: _profiled(steps[name], bench) for name in ("dense", "probmask")}
        for trainer in trainers.values():
            trainer.store.close()
            trainer.reporter.close()
            trainer.close()
    extra = seconds["probmask"] / seconds["dense"] - 1
    precision = f"{config.precision}, {'compiled' if config.compile else 'eager'}"
    found = [
        share(
            "probmask_step_overhead", 1000 * seconds["probmask"], 1000 * seconds["dense"], "ms",
            f"{extra:+.1%}; {work}, I = 1, {precision}; baseline: dense step, same engine", bar=1.05 if cuda else 1.01,
        )
    ]  # fmt: skip
    dense = 1000 * seconds["dense"]
    note = f"I = {default}, the default: {default} passes over every image; baseline: dense step, same engine"
    found.append(share("probmask_step_default", 1000 * seconds["default"], dense, "ms", note))
    ours = ("chain rule", "optimizer", "constraint", "parameters")
    added = sum(max(where["probmask"][name] - where["dense"][name], 0.0) for name in ours)
    others = sum(where["probmask"].values()) - added
    note = f"{added / others:+.1%}: mask, its gradients, Adam and projection, in one trace; baseline: the rest of it"
    found.append(share("probmask_step_added", 1000 * added, 1000 * others, "ms", note))
    plain = "plain PyTorch DDP + channels_last + SGD" + (" + torch.compile + bf16" if cuda else "")
    for case, name in (("step_images_per_s", "probmask"), ("dense_images_per_s", "dense")):
        rate, base = work.batch_size / seconds[name], work.batch_size / seconds["plain"]
        bar = 1.0 if cuda else 0.99 if name == "dense" else None
        found.append(more_per_second(case, rate, base, "images/s", f"{name}; baseline: {plain}", bar=bar))
    return [*found, *_where_rows(where)]


def plain_step(work: Workload, bench: Bench) -> Work:
    """One training step as a good plain PyTorch script has it: DDP, channels_last, and on CUDA compile and bf16."""
    cuda = bench.device.type == "cuda"
    data = OneBatch(work, bench.world)
    batch = data.batch
    # "resnet50" is torchvision's own.
    net = build_model(ModelConfig(name=work.model), work.num_classes, data.image_shape, 0)
    net = net.to(bench.device).to(memory_format=torch.channels_last)
    wrapped = nn.parallel.DistributedDataParallel(net, process_group=bench.world.group)
    parallel: Any = torch.compile(wrapped) if cuda else wrapped
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> object:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=cuda):
            loss = nn.functional.cross_entropy(parallel(batch.images), batch.labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def _step_of(trainer: Trainer, bench: Bench) -> Work:
    signals = StopSignals()
    batches: Iterator[Batch] = iter(trainer.data.train(trainer.position.epoch))

    def step() -> object:
        with record_function("data wait"):
            batch = next(batches)
        return trainer.step(batch, signals)

    return step


def _profiled(step: Work, bench: Bench) -> dict[str, float]:
    count = 1 if bench.quick or bench.device.type == "cpu" else 5
    with profile(activities=activities()) as trace:
        for _ in range(count):
            with record_function("step"):
                step()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    return {name: s / count for name, s in seconds_by_category(trace, bench.device).items()}


def _where_rows(where: dict[str, dict[str, float]]) -> list[Row]:
    total = sum(where["probmask"].values())
    return [
        Row(
            "step_where", 1000 * where["probmask"][name], "ms", 1000 * where["dense"][name], None,
            f"{name}: {where['probmask'][name] / total:.1%} of ProbMask's traced step; baseline: dense",
        )
        for name in (*CATEGORIES, "rest")
    ]  # fmt: skip
