"""ghostmask train: start a run or go on with it, then export the sparse network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from ghostmask.engine.atomic import replacing
from ghostmask.engine.checkpoint.store import CheckpointError, CheckpointStore, Saved
from ghostmask.engine.errors import InputError
from ghostmask.engine.evaluation import Score, score
from ghostmask.engine.world import World, connect, rank_from_environment
from ghostmask.launcher.checks import check_config
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import write_export
from ghostmask.launcher.folder import older, resumed
from ghostmask.launcher.run import Run, Shares, assemble, build_method, open_data, settle
from ghostmask.launcher.settings import run_folder, to_dict, to_yaml
from ghostmask.launcher.summary import closing_table

WRITTEN = ("checkpoints", "tensorboard", "profile", "export", "hessian", "metrics.jsonl", "config.yaml")
"""What a run writes into its folder, and so what --restart removes."""


def train(config: RunConfig, *, restart: bool = False) -> int:
    """Train `config` in its run folder, from the newest intact checkpoint there if there is one; returns exit code 0.

    restart: remove what is in the folder first. Raises InputError when the folder's configuration differs, and
    RunStopped when the run ends early (docs/operations.md lists the exit codes).
    """
    folder, (_, size, _) = run_folder(config), rank_from_environment()
    config = resumed(config, restart=restart)
    check_config(config, size)
    with connect(config.train.device) as world:
        config = settle(config, world)
        shares = Shares.of(config, world)
        data = open_data(config, world, shares.plain.parts)
        method = build_method(config, world, data)
        saved, store = open_folder(folder, config, world, restart=restart)
        with assemble(config, folder, data, method, store, saved, shares).closing() as run:
            if saved is not None and world.is_main:
                run.reporter.progress.message(f"resuming {folder} at step {saved.step}, phase {saved.meta['phase']}")
            run.execute(saved)
            finish(run, folder)
    return 0


def finish(run: Run, folder: Path) -> None:
    """Collective: evaluate the masked network, export it and print the closing table."""
    masks = run.masks()
    result = evaluate_masked(run)
    if run.world.is_main:
        shape = run.data.image_shape
        summary = write_export(
            folder / "export", run.net, masks, accuracy=result.accuracy, image_shape=shape, config=to_dict(run.config)
        )
        run.reporter.progress.close()
        print(closing_table(summary, folder, run.reporter.mean_images_per_s), flush=True)
    run.world.barrier()


@torch.no_grad()
def evaluate_masked(run: Run) -> Score:
    """Collective: score of the plain network with its pruned weights set to zero (they stay so)."""
    for name, mask in run.masks().items():
        run.net.get_parameter(name).masked_fill_(~mask, 0.0)
    run.net.eval()
    return score(run.net, run.data.evaluate(), run.world, run.config.train.precision)


def open_folder(
    folder: Path, config: RunConfig, world: World, *, restart: bool = False
) -> tuple[Saved | None, CheckpointStore]:
    """Collective: the newest intact checkpoint of the run folder (None for a new run) and its store."""
    if restart and world.is_main:
        _remove_written(folder)
    world.barrier()
    saving = config.checkpoint
    store = CheckpointStore(folder / "checkpoints", world, saving.keep, saving.asynchronous, warn=_warn)
    try:
        saved = store.latest()
        if saved is not None and not isinstance(saved.meta.get("updates"), int):
            raise older(folder, f"{saved.path.name} keeps other tensors")
    except InputError as error:
        store.close()
        fix = "; run with --restart to start over (this removes the run's files)"
        raise InputError(f"{error}{fix if isinstance(error, CheckpointError) else ''}") from None
    if world.is_main:  # nothing is touched before the checkpoints are known to be good
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "config.yaml") as writing:
            writing.write_text(to_yaml(config), encoding="utf-8")
    world.barrier()
    return saved, store


def _remove_written(folder: Path) -> None:
    for name in WRITTEN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _warn(text: str) -> None:
    print(f"ghostmask: warning: {text}", file=sys.stderr, flush=True)
