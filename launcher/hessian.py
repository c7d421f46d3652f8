"""ghostmask hessian: how sharply does the loss curve along a run's checkpoints?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path

from torch import Tensor
from torch.func import functional_call

from ghostmask.engine.checkpoint.store import CheckpointError, CheckpointStore, Saved
from ghostmask.engine.curvature import Curvature, Spectrum, top_eigenvalues
from ghostmask.engine.data import Batch, DataPipeline
from ghostmask.engine.errors import InputError, output
from ghostmask.engine.launch import read_launch
from ghostmask.engine.metrics import MetricWriter
from ghostmask.engine.progress import Progress
from ghostmask.engine.reporting import Reporter
from ghostmask.engine.world import World, connect
from ghostmask.launcher.checks import check_reader
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import read_run
from ghostmask.launcher.open_run import check_reading, reading_store, still_there
from ghostmask.launcher.run import Run, Shares, build_method, open_data, plan, settle
from ghostmask.masks.masked import present_masks


def hessian(run: Path, out: Path, *, top: int, batches: int) -> int:
    """Print, and write to the folder `out`, the `top` largest eigenvalues at every checkpoint that the run holds."""
    config = read_run(run)
    check_reader(config, read_launch().size)
    with connect(config.train.device, config.train.timeout_minutes) as world:
        config = settle(config, world)
        shares = Shares.of(config, world)
        data = open_data(config, world, shares.plain.parts)
        measure(run, out, config, world, data, shares, top=top, num_batches=batches)
    return 0


def measure(
    folder: Path, out: Path, config: RunConfig, world: World, data: DataPipeline, shares: Shares, *, top: int,
    num_batches: int,
) -> list[tuple[int, Spectrum]]:  # fmt: skip
    """Collective: (step, spectrum) of each intact checkpoint, oldest first; written to the folder `out` on rank 0. One
    that the run retires meanwhile is left out.

    The loss: plain cross-entropy over the first num_batches training batches of epoch 0, with batch norm in evaluation
    mode, so that it is one function on any number of ranks. The point: the network as it trains at the checkpoint,
    with the ghosts and soft activations of that moment and its pruned weights at zero (and, in a search, batch norm
    that fits them), or its moving average where ema.decay keeps one. The subspace: all weights that
    the mask keeps and all other parameters of the plain network. Raises InputError where there is no checkpoint.
    """
    store = reading_store(folder, world)
    saves = store.every()
    if not saves:
        store.close()
        raise InputError(f"RUN = {str(folder)!r}: it holds no checkpoint; train it, with checkpoint.keep for more")
    check_reading(folder, saves[-1], config, data, world)
    with closing(data.train(0)) as loaded:
        batches = [Batch(b.images.clone(), b.labels.clone()) for b in islice(loaded, num_batches)]
    reporter = Reporter(MetricWriter(out, world, None), Progress(world, saves[-1].step), world)
    if world.is_main:
        steps = ", ".join(str(s.step) for s in saves)
        output(f"{len(saves)} checkpoints are left of this run (checkpoint.keep = {config.checkpoint.keep}): {steps}")
    spectra = []
    for saved in saves:
        try:
            spectrum = _at(saved, config, world, data, shares, store, reporter, batches, top)
        except CheckpointError:
            if still_there(saved, world):
                raise
            continue
        spectra.append((saved.step, spectrum))
        _write(saved, spectrum, reporter, world, data.steps_per_epoch)
    store.close()
    reporter.close()
    data.close()
    return spectra


def _at(
    saved: Saved, config: RunConfig, world: World, data: DataPipeline, shares: Shares, store: CheckpointStore, reporter:
    Reporter,
    batches: list[Batch], top: int,
) -> Spectrum:  # fmt: skip
    method = build_method(config, world, data)
    run = Run(config, world, shares, data, method.net, method, plan(method, data.steps_per_epoch), store, reporter)
    (phase,) = [p for p in run.phases if p.name == saved.meta["phase"]]
    trainer = run.trainer(phase, saved.step)
    trainer.resume(saved)
    trainer.statistics.average(world)
    for hook in trainer.task.hooks:
        hook.on_start(trainer)
        hook.on_epoch_start(trainer)
    world.pulse.enter(f"eigenvalues at step {saved.step}")
    with trainer.evaluation_weights():
        masks = present_masks(trainer.sharded.optimizer)

        def logits(parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
            result: Tensor = functional_call(run.net, dict(parameters), (images,))
            return result

        point = {name: p.detach().float() for name, p in run.net.named_parameters()}
        curvature = Curvature(logits, point, masks, batches, world)
        spectrum = top_eigenvalues(curvature.product, curvature.start(), top)
    for hook in trainer.task.hooks:
        hook.on_stop(trainer)
    trainer.close()
    return spectrum


def _write(saved: Saved, spectrum: Spectrum, reporter: Reporter, world: World, steps_per_epoch: int) -> None:
    values = {f"hessian/eigenvalue_{i}": v for i, v in enumerate(spectrum.eigenvalues, start=1)}
    values["hessian/products"] = spectrum.products
    phase, epoch = str(saved.meta["phase"]), (saved.step - 1) // steps_per_epoch
    reporter.writer.scalars(saved.step, values, phase=phase, epoch=epoch)
    if world.is_main:
        numbers = "  ".join(f"{v:.4g}" for v in spectrum.eigenvalues)
        note = "" if spectrum.converged else f"  (not converged after {spectrum.products} products)"
        output(f"step {saved.step}  {phase} epoch {epoch}  largest eigenvalues  {numbers}{note}")
