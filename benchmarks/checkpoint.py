"""How long does the training loop stand still for a save, in the background and with the loop waiting?"""

from __future__ import annotations

from statistics import median
from time import perf_counter

from ghostmask.benchmarks.row import Row, share
from ghostmask.benchmarks.timing import Bench, scratch
from ghostmask.benchmarks.trainers import Workload, make_trainer, workload
from ghostmask.engine.checkpoint.entries import checkpoint_entries
from ghostmask.engine.checkpoint.pieces import Piece
from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.config import TrainConfig

MINUTES_BETWEEN = 5


def rows(bench: Bench) -> list[Row]:
    """Cases checkpoint_stall, checkpoint_first_stall, checkpoint_share and checkpoint_bandwidth."""
    work = workload(bench)
    work = Workload(work.model, 2, 32, work.num_classes)  # the images play no part in a save
    repeats = 2 if bench.quick else 5
    with scratch() as folder:
        trainer = make_trainer("probmask", work, bench.world, folder, TrainConfig(log_every=100_000))
        entries = checkpoint_entries(trainer.model, trainer.sharded.optimizer, trainer.statistics, ())
        stores = {
            kind: CheckpointStore(folder / kind, bench.world, keep=2, asynchronous=kind == "asynchronous")
            for kind in ("asynchronous", "synchronous")
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in stores}
        for step in range(1 + repeats):
            for kind, store in stores.items():
                start = perf_counter()
                store.save(step, entries, {})
                seconds[kind].append(perf_counter() - start)
                store.wait()  # untimed: five minutes lie between two saves
        for store in stores.values():
            store.close()
        trainer.store.close()
        trainer.reporter.close()
        trainer.close()
    tensors = [value.tensor if isinstance(value, Piece) else value for value in entries.values()]
    total = sum(t.numel() * t.element_size() for t in tensors)
    ms = {kind: 1000 * median(values[1:]) for kind, values in seconds.items()}
    what = f"{work.model} with ProbMask's state, {total / 1e6:.0f} MB"
    return [
        share(
            "checkpoint_stall", ms["asynchronous"], ms["synchronous"], "ms",
            f"{what}; baseline: the loop waits until all is on disk with its checksums", bar=0.1,
        ),
        share(
            "checkpoint_first_stall", 1000 * seconds["asynchronous"][0], 1000 * seconds["synchronous"][0], "ms",
            "the first save of a process, which also makes the buffers",
        ),
        share(
            "checkpoint_share", ms["asynchronous"] / 1000, 60 * MINUTES_BETWEEN, "s",
            f"share of a run with one save per {MINUTES_BETWEEN} minutes", bar=0.02,
        ),
        Row("checkpoint_bandwidth", total / 1e3 / ms["synchronous"], "MB/s", note="bytes over a synchronous save"),
    ]  # fmt: skip
