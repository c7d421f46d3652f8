"""ghostmask export: write the sparse network of a run's newest checkpoint, finished or not."""

from __future__ import annotations

from pathlib import Path

from ghostmask.engine.errors import InputError
from ghostmask.engine.world import connect, rank_from_environment
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.folder import read_run
from ghostmask.launcher.run import Shares, assemble, build_method, open_data, settle
from ghostmask.launcher.train import finish, open_folder


def export_run(run: Path) -> int:
    """Write RUN/export from the newest intact checkpoint.

    A search by ProbMask that goes on gets the mask it would end with now. gmp and lth keep their present mask, at its
    density: what they prune later, they prune after more training.
    """
    config = read_run(run)
    check_config(config, rank_from_environment()[1])
    with connect(config.train.device) as world:
        config = settle(config, world)
        shares = Shares.of(config, world)
        data = open_data(config, world, shares.plain.parts)
        method = build_method(config, world, data)
        saved, store = open_folder(run, config, world)
        if saved is None:
            store.close()
            raise InputError(f"RUN = {str(run)!r}: it holds no checkpoint yet; train it first")
        with assemble(config, run, data, method, store, saved, shares).closing() as built:
            built.execute(saved, train=False)
            last = built.phases[-1].end_step
            if world.is_main and saved.step < last:
                where = f"phase {saved.meta['phase']}, step {saved.step}"
                built.reporter.progress.message(f"the run is not finished: {where} of {last}")
            finish(built, run)
    return 0
