"""What does it cost to be many: ranks that meet, first collectives, a checkpoint's files and index?

Real processes of this machine, 64 of them, meet, save and load; what they hold is as much as a hundredth of ResNet-50,
in as many pieces as all of it. What rank 0 does alone is done as for 1,024 and 4,096 ranks: the plan and the index
of one checkpoint.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

from ghostmask.benchmarks.row import Row
from ghostmask.benchmarks.timing import Bench, scratch
from ghostmask.engine.checkpoint.dcp import CheckedSave
from ghostmask.engine.checkpoint.index import INDEX, from_json, to_json
from ghostmask.engine.checkpoint.pieces import FragmentTensor, Piece
from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.launch import Launch
from ghostmask.engine.ranks import Ranks
from ghostmask.engine.sharding.slices import Layout
from ghostmask.engine.spawn import free_port, run_distributed
from ghostmask.engine.world import World
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

PROCESSES, QUICK_PROCESSES = 64, 2
RANKS, QUICK_RANKS = (64, 1024, 4096), (64,)
BUCKETS = 8
STATES = ("weight", "weight.momentum", "probability", "probability.exp_avg", "probability.exp_avg_sq")
SMALLER = 100
"""Elements of ResNet-50 per element here."""


def rows(bench: Bench) -> list[Row]:
    """Cases scale_meet to scale_sockets on processes, scale_plan to scale_index_read for one rank among many."""
    count = QUICK_PROCESSES if bench.quick else PROCESSES
    shapes = _shapes("resnet20" if bench.quick else "resnet50")
    with scratch() as folder:
        ranks = run_distributed(_measure, count, str(folder), free_port(), shapes, timeout_s=900)
        files = list((folder / "checkpoints" / "step-00000002").iterdir())
        index = (folder / "checkpoints" / "step-00000002" / INDEX).stat().st_size
    worst = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    what = f"{count} processes"
    notes = {
        "meet": "join the ranks' store and wait for all", "group": "a process group of gloo over that store",
        "first": "its first all-reduce", "second": "its second", "objects": "all_gather_object of 20 bytes",
        "save": "a checkpoint, waited for", "save_again": "the next one, with the one before retired",
        "verify": "find the newest and read all checksums", "load": "fill all pieces from it",
    }  # fmt: skip
    others = {name: max(rank[name] for rank in ranks[1:]) for name in ranks[0]}
    found = []
    for name, note in notes.items():
        key = f"{name} cpu"
        busy = f"processor time of rank 0 {ranks[0][key]:.3f} s, of another at most {others[key]:.3f} s"
        found.append(Row(f"scale_{name}", worst[name], "s", note=f"{what}: {note}; {busy}"))
    found += [
        Row("scale_files", len(files), "files", note=f"{what}: one checkpoint"),
        Row("scale_index", index / 1e6, "MB", note=f"{what}: its index"),
        Row("scale_sockets", ranks[0]["sockets"], "sockets", note=f"{what}: on rank 0, with 2 process groups"),
        Row("scale_sockets", ranks[-1]["sockets"], "sockets", note=f"{what}: on the last rank"),
    ]
    return found + [row for size in (QUICK_RANKS if bench.quick else RANKS) for row in _alone(size, shapes)]


def _shapes(model: str) -> dict[str, torch.Size]:
    """Name -> a shape of a hundredth of the elements."""
    with torch.device("meta"):
        net = build_model(ModelConfig(name=model), 1000, (3, 32, 32), 0)
    return {name: torch.Size([max(1, p.numel() // SMALLER)]) for name, p in net.named_parameters()}


def _pieces(shapes: dict[str, torch.Size], rank: int, size: int) -> dict[str, Piece | Tensor]:
    """What a rank saves: its pieces of each state, and a counter that all have."""
    total = sum(shape.numel() for shape in shapes.values())
    layout = Layout(shapes, size, total // BUCKETS)
    pieces: dict[str, Piece | Tensor] = {"buffer/steps": torch.zeros(())}
    for state in STATES:
        for s in layout.segments(rank):
            pieces[f"prunable.{state}/{s.name}"] = Piece(shapes[s.name].numel(), s.offset, torch.zeros(s.numel))
    return pieces


def _measure(world: World, folder: str, port: int, shapes: dict[str, torch.Size]) -> dict[str, float]:
    """Collective: what -> seconds on this rank, and of its processor time (sockets: how many more it has open)."""
    found: dict[str, float] = {}
    before = _sockets()

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        world.barrier()
        start, busy = perf_counter(), process_time()
        yield
        found[name], found[f"{name} cpu"] = perf_counter() - start, process_time() - busy

    with timed("meet"):
        ranks = Ranks(Launch(world.rank, world.size, world.rank, world.size, "127.0.0.1", port))
        ranks.arrive(300)
    with timed("group"):
        group: Any = dist.new_group(backend="gloo")
    one = torch.ones(1)
    for name in ("first", "second"):
        with timed(name):
            dist.all_reduce(one, group=group)
    with timed("objects"):
        world.all_gather_object("x" * 20)
    pieces = _pieces(shapes, world.rank, world.size)
    store = CheckpointStore(Path(folder) / "checkpoints", world, keep=1, asynchronous=False)
    for step, name in enumerate(("save", "save_again"), start=1):
        with timed(name):
            store.save(step, pieces, {})
    with timed("verify"):
        saved = store.latest()
    assert saved is not None
    with timed("load"):
        store.load(saved, pieces)
    found["sockets"] = _sockets() - before
    store.close()
    world.barrier()
    return found


def _alone(size: int, shapes: dict[str, torch.Size]) -> list[Row]:
    """What rank 0 of `size` does by itself for a checkpoint, and what every rank reads of it."""
    plans = []
    for rank in range(size):
        planner = CheckedSave()
        state = {n: FragmentTensor(v) if isinstance(v, Piece) else v for n, v in _pieces(shapes, rank, size).items()}
        planner.set_up_planner(state, is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    received = len(pickle.dumps(plans[-1]))
    start = process_time()
    plans, metadata = CheckedSave().create_global_plan(plans)
    planned = process_time() - start
    metadata.storage_data = {
        item.index: StorageInfo(f"__{rank}_0.distcp", 4096 * number, 4096)
        for rank, plan in enumerate(plans) for number, item in enumerate(plan.items)
    }  # fmt: skip
    start = process_time()
    text = to_json(metadata)
    written = process_time() - start
    start = process_time()
    from_json(text)
    read = process_time() - start
    what = f"{size} ranks, processor time"
    return [
        Row("scale_plan", planned, "s", note=f"{what}: rank 0 merges the ranks' plans, {received / 1e3:.1f} kB each"),
        Row("scale_index_written", written, "s", note=f"{what}: rank 0 makes the text, {len(text) / 1e6:.2f} MB"),
        Row("scale_index_read", read, "s", note=f"{what}: a rank reads it"),
    ]


def _sockets() -> int:
    """Sockets that this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return count
