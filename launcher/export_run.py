"""ghostmask export: write the sparse network of a run's newest checkpoint, finished or not."""

from __future__ import annotations

from pathlib import Path

from engine.errors import InputError
from engine.world import connect
from launcher.run import assemble, open_data
from launcher.settings import load_config
from launcher.train import finish, open_folder


def export_run(run: Path) -> int:
    """Write RUN/export from the newest intact checkpoint; a search that goes on gets the mask it would end with now."""
    config = load_config(str(run / "config.yaml"), [])
    with connect(config.train.device) as world:
        saved, store = open_folder(run, config, world)
        if saved is None:
            store.close()
            raise InputError(f"RUN = {str(run)!r}: it holds no checkpoint yet; train it first")
        built = assemble(config, run, world, open_data(config, world), store, saved)
        try:
            built.execute(saved, train=False)
            if world.is_main and saved.step < built.phases[-1].end_step:
                built.reporter.progress.message(
                    f"the run is not finished: step {saved.step} of {built.phases[-1].end_step}"
                )
            finish(built, run)
        finally:
            built.close()
    return 0
