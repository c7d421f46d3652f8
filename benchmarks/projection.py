"""How fast is the exact projection on one rank, how often do ranks talk, and what follows for thousands of them?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ghostmask.benchmarks import textbook
from ghostmask.benchmarks.projection_ranks import model_rows
from ghostmask.benchmarks.row import Row, faster, share
from ghostmask.benchmarks.timing import Bench, Work, copy_bandwidth, device_seconds, interleaved
from ghostmask.engine.world import World
from ghostmask.masks.kernels.projection import project_

NUMEL, QUICK_NUMEL = 25_502_912, 200_000
DENSITY, RANKS = 0.1, 8
MOVED_BYTES = 4 * (1 + 2)
"""Per element: what no exact method can do without: read it to find v, read and write it to subtract v."""


@dataclass(frozen=True)
class CountingWorld(World):
    """A world that counts its all-reduces."""

    calls: list[int] | None = None

    def all_reduce(self, tensor: Tensor, op: object = torch.distributed.ReduceOp.SUM) -> Tensor:
        """Collective: as World's; one more call in `calls`."""
        assert self.calls is not None
        self.calls.append(tensor.numel() * tensor.element_size())
        return super().all_reduce(tensor, op)


def rows(bench: Bench) -> list[Row]:
    """Cases projection and _start (on CUDA _device of both), _floor, _slice, _collectives, _error; the model's."""
    numel = QUICK_NUMEL if bench.quick else NUMEL
    budget = DENSITY * numel
    bandwidth = copy_bandwidth(bench.device, bench.quick)
    found: list[Row] = []
    for case, make in (("projection", trained), ("projection_start", start)):
        source = make(numel, bench.device)
        z = source.clone()
        ms = _milliseconds(source, z, budget, bench)
        what = f"{numel:,} probabilities in mid-training" if case == "projection" else "all equal but for one Adam step"
        note = f"{what}; baseline: bisection, {textbook.PROBES} probes over one flat float32 tensor"
        cuda = bench.device.type == "cuda"
        # On a GPU 40 times is all that its memory allows, and a step's host runs ahead of these launches.
        found.append(faster(case, ms["ours"], ms["textbook"], "ms", note, bar=None if cuda else 40))
        if cuda:
            note = f"the device's time, launches queued beforehand as in a step; {note}"
            found.append(faster(f"{case}_device", ms["ours on device"], ms["textbook on device"], "ms", note))
        if case == "projection":
            note = f"baseline: {MOVED_BYTES} bytes per element (2 reads, 1 write) at the bandwidth of a copy"
            found += [
                share("projection_floor", ms["ours"], 1000 * MOVED_BYTES * numel / bandwidth, "ms", note),
                share(
                    "projection_slice",
                    ms["slice"],
                    ms["ours"],
                    "ms",
                    f"one rank's slice of {RANKS}; baseline: the whole network; 1/{RANKS} = {1 / RANKS}",
                ),
                *_counts(bench, source, z, budget),
            ]
    return [*found, *model_rows(bench)]


def _milliseconds(source: Tensor, z: Tensor, budget: float, bench: Bench) -> dict[str, float]:
    """Of the projection, which overwrites z, of that of one rank's slice by itself, and of bisection."""
    first, end = len(z) * 3 // RANKS, len(z) * 4 // RANKS
    own = z[first:end]
    alone = replace(bench.world, rank=0, size=1)
    work: dict[str, Work] = {
        "ours": lambda: project_([[(z, 0)]], [budget], [len(z)], alone),
        "slice": lambda: project_([[(own, first)]], [budget / RANKS], [len(own)], alone),
        "textbook": lambda: textbook.project(source, budget),
    }
    prepare: dict[str, Work] = {"ours": lambda: z.copy_(source), "slice": lambda: own.copy_(source[first:end])}
    repeats = 3 if bench.quick else 50 if bench.device.type == "cuda" else 5
    seconds = interleaved(work, repeats, bench.device, prepare)
    if bench.device.type == "cuda":
        on_device = device_seconds(work, repeats, prepare)
        seconds |= {f"{name} on device": value for name, value in on_device.items()}
    return {name: 1000 * value for name, value in seconds.items()}


def trained(numel: int, device: torch.device) -> Tensor:
    """(numel,) probabilities as in the middle of a run, just after Adam moved them: most near 0, some near 1."""
    generator = torch.Generator(device).manual_seed(2)
    s = torch.rand(numel, generator=generator, device=device)
    s = torch.where(s < 0.6, 0.0, torch.where(s > 0.95, 1.0, s))
    return s.add_(torch.randn(numel, generator=generator, device=device), alpha=6e-3)


def start(numel: int, device: torch.device) -> Tensor:
    """(numel,) ones after Adam's first step, which moves each by the learning rate up or down: two values."""
    generator = torch.Generator(device).manual_seed(3)
    up = torch.rand(numel, generator=generator, device=device) < 0.5
    return torch.where(up, 1.006, 0.994)


def _counts(bench: Bench, source: Tensor, z: Tensor, budget: float) -> list[Row]:
    world = bench.world
    counting = CountingWorld(world.rank, world.size, world.device, world.group, [])
    z.copy_(source)
    project_([[(z, 0)]], [budget], [len(z)], counting)
    assert counting.calls is not None
    error = abs(z.sum(dtype=torch.float64).item() - budget)
    bisected = abs(textbook.project(source, budget).sum(dtype=torch.float64).item() - budget)
    sent = sum(counting.calls)
    return [
        share(
            "projection_collectives", len(counting.calls), textbook.PROBES + 2, "all-reduces",
            f"first check included, {sent:,} bytes in all; baseline: check, maximum, one per probe",
            bar=4 / (textbook.PROBES + 2),
        ),
        Row("projection_error", error, "weights", bisected, None, "|sum s - K|; baseline: bisection's"),
    ]  # fmt: skip
