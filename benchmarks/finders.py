"""How long does each finder take, and how much memory, on a network as large as ImageNet's? The bar: 16 GB."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import fields, replace
from itertools import repeat
from time import perf_counter

import torch
from torch import nn

from ghostmask.benchmarks.row import Row, share
from ghostmask.benchmarks.timing import Bench, peak_extra_bytes
from ghostmask.benchmarks.trainers import OneBatch, Workload
from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.data import Batch
from ghostmask.engine.registry import resolve
from ghostmask.engine.world import World
from ghostmask.masks.method import Recipe
from ghostmask.masks.methods.grasp import SHARE, default_per_class
from ghostmask.masks.registry import METHODS
from ghostmask.masks.settings import MaskSettings
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

BAR_BYTES = 16_000_000_000
"""One GPU's memory that every finder should fit into."""
IMAGENET_CLASSES = 1000
FINDERS = ("random", "magnitude", "synflow", "snip", "grasp", "mlprune")
ITERATIONS = 10
"""SynFlow's, of which each takes the same time; by default it makes ten times as many."""


class Labelled(OneBatch):
    """One random image of each class, again and again: GraSP sees every image once."""

    def __init__(self, work: Workload, world: World) -> None:
        super().__init__(work, world)
        self.num_classes = work.batch_size
        self.batch = Batch(self.batch.images, torch.arange(work.batch_size, device=world.device))

    def train(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """The batch, a few times."""
        yield from repeat(self.batch, 4)


def rows(bench: Bench) -> list[Row]:
    """Cases finder_NAME, the seconds of a `find`, and finder_NAME_memory, the most that it holds beside the network.

    Finders that see images get one chunk of them: what the default number takes follows in proportion.
    """
    usual_settings = {name: resolve(METHODS[name]).Settings() for name in FINDERS}
    model, side = ("resnet20", 32) if bench.quick else ("resnet50", 224)
    batch, iterations = (6, 2) if bench.quick else (usual_settings["snip"].score_batch, ITERATIONS)
    few = -(-batch // SHARE)
    images = {
        "snip": (batch, usual_settings["snip"].score_batches * usual_settings["snip"].score_batch),
        "grasp": (few, default_per_class(IMAGENET_CLASSES) * IMAGENET_CLASSES),
        "mlprune": (batch, usual_settings["mlprune"].score_batches * usual_settings["mlprune"].score_batch),
    }
    net = build_model(ModelConfig(model), IMAGENET_CLASSES, (3, side, side), 0).to(bench.device)
    found = []
    small = {"score_batch": batch, "score_batches": 1, "samples_per_class": 1, "iterations": iterations}
    for name in FINDERS:
        seen, usual = images.get(name, (1, 1))
        known = {field.name for field in fields(usual_settings[name])}
        settings = replace(usual_settings[name], method=name, **{k: v for k, v in small.items() if k in known})
        seconds, held = measured(settings, net, Labelled(Workload(model, seen, side), bench.world), bench)
        what, times = "no images", 1.0
        if name in images:
            what, times = f"{seen} images at once; the default for ImageNet, {usual:,}", usual / seen
        if name == "synflow":
            what = f"{iterations} iterations; the default, {usual_settings[name].iterations}"
            times = usual_settings[name].iterations / iterations
        reckoned = "" if times == 1 else f", takes {seconds * times / 60:.1f} minutes (reckoned)"
        note = "most that is held beside the network; baseline: 16 GB"
        found += [
            Row(f"finder_{name}", seconds, "s", note=f"{model}, {side} x {side} pixels, {what}{reckoned}"),
            share(f"finder_{name}_memory", held / 1e6, BAR_BYTES / 1e6, "MB", note, bar=1),
        ]
    return found


def measured(settings: MaskSettings, net: nn.Module, data: Labelled, bench: Bench) -> tuple[float, int]:
    """(seconds, bytes held beside the network at most) of one `find`, in the same run: it takes minutes on a CPU."""
    recipe = Recipe(OptimConfig(), FinetuneConfig(), 1, 0)
    method = resolve(METHODS[settings.method])(settings, net, recipe, bench.world)
    seconds: list[float] = []

    def find() -> None:
        start = perf_counter()
        masks = method.find(data)
        sum(int(mask.sum()) for mask in masks.values())  # waits for the device
        seconds.append(perf_counter() - start)

    held = peak_extra_bytes(find, bench.device, warm_up=False)
    return seconds[-1], held
