"""ghostmask train: start a run or go on with it, then export the sparse network."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ghostmask.engine.agree import on_main
from ghostmask.engine.errors import EXIT_NOT_SAVED, RunStopped, tell, to_stderr
from ghostmask.engine.evaluation import Score, score
from ghostmask.engine.launch import read_launch
from ghostmask.engine.world import connect
from ghostmask.launcher.banner import SaysCheckpoints, banner
from ghostmask.launcher.checks import check_config, check_steps
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import network_facts, use, write_export
from ghostmask.launcher.folder import resumed
from ghostmask.launcher.open_run import OpenRun, open_owned
from ghostmask.launcher.recipe import recipe_hooks
from ghostmask.launcher.record import versions
from ghostmask.launcher.run import Run, Shares, assemble, build_method, open_data, settle
from ghostmask.launcher.settings import run_folder, to_dict
from ghostmask.launcher.source import Source
from ghostmask.launcher.spare import spare_ranks
from ghostmask.launcher.summary import closing_table

NO_USE_TO_TRY_AGAIN = (errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
EXPORT_TRIES = 5
"""Of an export to a disk that takes nothing, with 1, 2, 4 and 8 s between them."""


def train(config: RunConfig, *, restart: bool = False, source: Source | None = None, new_data: bool = False) -> int:
    """Train `config` in its run folder, from the newest intact checkpoint there if there is one; returns the exit code,
    0, or EXIT_NOT_SAVED where the last checkpoints could not be saved.

    restart: remove what the run before wrote first. source: the checkpoint of another run that a new one starts from.
    new_data: go on although the data changed. Raises InputError when the folder has an owner, or holds another
    configuration, and RunStopped when the run ends early (docs/operations.md lists the exit codes).
    """
    config = resumed(config, restart=restart)
    check_config(config, read_launch().size)
    spares = spare_ranks(config, launch := read_launch())
    if spares is not None and spares.is_one:
        return spares.wait()
    code = _train_owned(config, restart, source, new_data)
    if spares is not None and launch.rank == 0:
        spares.dismiss(code)
    return code


def _train_owned(config: RunConfig, restart: bool, source: Source | None, new_data: bool) -> int:
    folder = run_folder(config)
    with connect(config.train.device, config.train.timeout_minutes, folder / "hang") as world:
        config = settle(config, world)
        shares = Shares.of(config, world)
        data = open_data(config, world, shares.plain.parts)
        check_steps(config, data.steps_per_epoch)
        method, recipe = build_method(config, world, data), recipe_hooks(config, data, world)
        opened = open_owned(folder, config, world, data, restart=restart, source=source, new_data=new_data)
        try:
            with assemble(config, folder, data, method, opened, shares, recipe).closing() as run:
                run.hooks = (*run.hooks, SaysCheckpoints())
                return _train(run, opened, source)
        finally:
            opened.release()


def _train(run: Run, opened: OpenRun, source: Source | None) -> int:
    saved = opened.saved
    if saved is not None:
        run.check_place(saved, f"--from {source}" if source else f"run = {str(opened.folder)!r}")
        if run.world.is_main:
            run.reporter.progress.message(f"resuming {opened.folder} at step {saved.step}, phase {saved.meta['phase']}")
    if run.config.lr_scale != 1 and run.world.is_main:
        run.reporter.progress.message(rates_text(run.config))
    if run.world.is_main:
        run.reporter.progress.message(banner(run))
    run.execute(saved)
    finish(run, opened.folder / "export", opened.folder)
    opened.store.wait()
    if opened.store.failures:
        if run.world.is_main:
            to_stderr(
                f"the last {opened.store.failures} saves FAILED: the network is exported, but {opened.store.folder} "
                "does not hold the end of the run; free the disk, and run the same command again to have it"
            )
        return EXIT_NOT_SAVED
    return 0


def rates_text(config: RunConfig) -> str:
    """What optim.scale_lr makes of the learning rates."""
    scale, optim = config.lr_scale, config.optim
    rates = f"optim.lr {optim.lr:g} -> {optim.lr * scale:g}, finetune.lr {config.finetune.lr:g} -> "
    return (
        f"learning rates for {config.data.batch_size} images ({optim.scale_lr}): {rates}{config.finetune.lr * scale:g}"
    )


def finish(run: Run, out: Path, folder: Path, mark: str = "", step: int | None = None) -> None:
    """Collective: evaluate the masked network, export it to `out` and print the closing table of the run in `folder`.

    mark: of the files while they are written (see engine.atomic); step: where the run is (None: at its end). Raises
    RunStopped where the disk takes no export.
    """
    masks = run.masks()
    run.world.pulse.enter("evaluation of the result")
    result = evaluate_masked(run)
    run.store.check_owner()
    run.world.pulse.enter(f"writing the export to {out}")
    details: dict[str, Any] = {
        "accuracy": result.accuracy, "top5": result.top5, "image_shape": run.data.image_shape,
        "config": to_dict(run.config),
        "usage": use(run.config),
        "facts": _facts(run, step),
    }  # fmt: skip

    def export() -> None:
        summary = _persistently(lambda: write_export(out, run.net, masks, mark=mark, **details), out)
        run.reporter.progress.close()
        tell(closing_table(summary, folder, out, run.reporter.mean_images_per_s), sys.stdout)

    on_main(run.world, export)


def _facts(run: Run, step: int | None) -> dict[str, Any]:
    """What else a reader of summary.json needs: the network, how far the run is, the images and the software."""
    data, steps = run.data, run.phases[-1].end_step
    side = run.config.data.eval_size or data.image_shape[1]
    return {
        "network": network_facts(run.net, run.config, data.num_classes, (data.image_shape[0], side, side)),
        "run": {"name": run.config.run, "step": steps if step is None else step, "steps": steps},
        "data": dict(data.identity),
        "versions": versions(),
    }


def _persistently(write: Any, out: Path) -> Any:
    """write(), again after a while where the disk takes nothing. Raises RunStopped where it never does."""
    for wait_s in [2.0**n for n in range(EXPORT_TRIES - 1)] + [0.0]:
        try:
            return write()
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in NO_USE_TO_TRY_AGAIN:
                break
            if wait_s:
                to_stderr(f"{out} cannot be written ({reason}); trying again in {wait_s:.0f} s")
                time.sleep(wait_s)
    raise RunStopped(
        f"the export could not be written to {out} ({reason}); what is trained is in the checkpoints: free the disk, "
        "and run the same command again, or: ghostmask export RUN --out FOLDER",
        EXIT_NOT_SAVED,
    )


@torch.no_grad()
def evaluate_masked(run: Run) -> Score:
    """Collective: score of the plain network with its pruned weights set to zero (they stay so)."""
    for name, mask in run.masks().items():
        run.net.get_parameter(name).masked_fill_(~mask, 0.0)
    run.method.silence()
    run.net.eval()
    return score(run.net, run.data.evaluate(), run.world, run.config.train.precision, flip=run.config.train.eval_flip)
