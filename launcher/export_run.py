"""ghostmask export: write the sparse network of a run's newest checkpoint, finished or not."""

from __future__ import annotations

import os
from pathlib import Path

from ghostmask.engine.checkpoint.store import CheckpointError, CheckpointStore, Saved
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.errors import InputError
from ghostmask.engine.launch import read_launch
from ghostmask.engine.world import World, connect
from ghostmask.launcher.checks import check_reader
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import read_run
from ghostmask.launcher.open_run import check_reading, open_to_read, still_there
from ghostmask.launcher.run import Shares, assemble_to_read, build_method, open_data, settle
from ghostmask.launcher.train import finish


def export_run(run: Path, out: Path) -> int:
    """Write `out` from the newest intact checkpoint of the run, which may be training: nothing of it is written to.

    A search by ProbMask that goes on gets the mask it would end with now. gmp, lth and acdc keep their present mask,
    at its density: what they prune later, they prune after more training.
    """
    config = read_run(run)
    check_reader(config, read_launch().size)
    with connect(config.train.device, config.train.timeout_minutes) as world:
        config = settle(config, world)
        shares = Shares.of(config, world)
        data = open_data(config, world, shares.plain.parts)
        while True:
            saved, store = open_to_read(run, world)
            if saved is None:
                store.close()
                raise InputError(f"RUN = {str(run)!r}: it holds no checkpoint yet; train it first")
            check_reading(run, saved, config, data, world)
            try:
                _export(run, out, config, world, data, shares, saved, store)
                return 0
            except CheckpointError:
                if still_there(saved, world):
                    raise  # else the run has gone on, and this checkpoint with it: there is a newer one


def _export(
    run: Path, out: Path, config: RunConfig, world: World, data: DataPipeline, shares: Shares, saved: Saved,
    store: CheckpointStore,
) -> None:  # fmt: skip
    method = build_method(config, world, data)
    with assemble_to_read(config, data, method, store, shares).closing() as built:
        built.execute(saved, train=False)
        last = built.phases[-1].end_step
        if world.is_main and saved.step < last:
            where = f"phase {saved.meta['phase']}, step {saved.step}"
            built.reporter.progress.message(f"the run is not finished: {where} of {last}")
        finish(built, out, run, mark=f".{os.getpid()}", step=saved.step)
