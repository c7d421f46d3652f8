"""The doctor's checks of the run itself: its data, its network, a real step, the loader beside it, hours and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch

from ghostmask.data_pipelines.loading.resizing import image_side
from ghostmask.engine.batchnorm import restored
from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.cores import cores_per_rank
from ghostmask.engine.data import Batch, DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.reporting import peak_memory_bytes
from ghostmask.engine.signals import StopSignals
from ghostmask.launcher.checks import check_steps
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.doctor.finding import Finding, failed, passed, warned
from ghostmask.launcher.doctor.machine import differences
from ghostmask.launcher.doctor.patient import Patient
from ghostmask.launcher.recipe import recipe_hooks
from ghostmask.launcher.run import assemble_to_read, build_method, open_data
from ghostmask.masks.method import FINETUNE

STEPS, STEPS_S = 5, 15.0
"""Timed steps after the first, and the time after which no more are begun."""
LONGEST_STEP_S = 20.0
"""On a CPU, a batch whose step would take longer is cut down, and its time reckoned from the smaller one's."""
LOADER_S = 6.0
FULL_SHARE = 0.9
"""Of a memory, above which it is too full."""
SMALLER = "a smaller data.batch_size, more ranks, more train.replicas, or train.precision=bf16"
FORWARD_SHARE = 1 / 3
"""Of a training step's time that an evaluation takes per image: a forward pass without its backward."""


def data(patient: Patient) -> Finding:
    """The files are readable and whole, and their steps fit the schedules."""
    config = patient.config
    patient.data = pipeline = open_data(config, patient.world, patient.shares.plain.parts)
    check_steps(config, pipeline.steps_per_epoch)
    return passed(
        f"{config.data.dataset} in {config.data.root}: {pipeline.num_train:,} + {pipeline.num_eval:,} images, "
        f"{pipeline.num_classes} classes, checksums right; {pipeline.steps_per_epoch:,} steps per epoch"
    )


def same_data(patient: Patient) -> Finding:
    """Collective: every rank has the same images in the same order."""
    assert patient.data is not None
    here = {name: str(value) for name, value in patient.data.identity.items()}
    differing = differences(here, patient.world.broadcast_object(here))
    if differing:
        return failed(f"other data than on rank 0: {differing}", "copy the same .beton files to every node")
    return passed("the same images in the same order on every rank")


def network(patient: Patient) -> Finding:
    """The network is built, and what it starts from and learns from is read."""
    assert patient.data is not None
    patient.method = method = build_method(patient.config, patient.world, patient.data)
    patient.recipe = recipe_hooks(patient.config, patient.data, patient.world)
    method.prepare()
    config, weights = patient.config, method.weights.values()
    parameters, prunable = sum(p.numel() for p in method.net.parameters()), sum(w.numel() for w in weights)
    return passed(
        f"{config.model.name}, {parameters:,} parameters, {prunable:,} prunable in {len(weights)} tensors; "
        f"mask.method={config.mask.method}"
    )


def step(patient: Patient) -> Finding:
    """Collective: real training steps on a real batch, under a mask that is not found yet."""
    assert patient.method is not None
    if not any(epochs for _, epochs in patient.method.phases()):
        return Finding("skip", "no phase of this run trains")
    batch, shrunk = _affordable(patient)
    trainer = patient.trainer
    assert trainer is not None
    for hook in patient.recipe:
        hook.on_start(trainer)
    device, times = patient.world.device, list[float]()
    with StopSignals() as signals:
        for _ in range(1 + STEPS):
            start = perf_counter()
            trainer.step(batch, signals)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(perf_counter() - start)
            patient.world.pulse.enter("timing steps")
            if patient.world.broadcast_object(sum(times) > STEPS_S):
                break
    patient.step_s = patient.world.broadcast_object(median(times[1:] or times)) * shrunk
    patient.passes = trainer.task.passes
    rate = patient.config.data.batch_size / patient.step_s
    reckoned = f", reckoned from a batch of {trainer.data.batch_size}" if shrunk > 1 else ""
    return passed(
        f"{patient.step_s:.3g} s, {rate:,.0f} images/s of all ranks{reckoned} (the first took {times[0]:.1f} s); the "
        "loss is finite"
    )


def loader(patient: Patient) -> Finding:
    """How fast this rank reads its training batches, beside the others, against what a step takes."""
    assert patient.data is not None
    config, parts = patient.config, patient.data.parts
    share = config.data.batch_size // parts.total * parts.count
    workers = config.data.num_workers or cores_per_rank()
    rate = loading_rate(patient.data, LOADER_S, config.data.grow_until)
    return enough(rate, share / patient.step_s, workers)


def loading_rate(pipeline: DataPipeline, limit_s: float, epoch: int = 0) -> float:
    """Images/s of this rank from `epoch` on, limit_s long, without the first batch, for which kernels are compiled."""
    images, begin, end = 0, 0.0, perf_counter() + 2 * limit_s
    while not begin or perf_counter() < min(begin + limit_s, end):
        with closing(pipeline.train(epoch)) as batches:
            for batch in batches:
                if begin:
                    images += len(batch.labels)
                begin = begin or perf_counter()
                if perf_counter() > begin + limit_s:
                    break
        epoch += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (perf_counter() - begin)


def enough(rate: float, wanted: float, workers: int) -> Finding:
    """rate: images/s that a rank reads; wanted: that its steps take."""
    text = f"a rank reads {rate:,.0f} images/s, its steps take {wanted:,.0f}"
    if rate < wanted:
        return warned(
            f"{text}: they will wait for data",
            f"more than data.num_workers={workers} where there are cores, images that decode faster "
            "(data.jpeg_fraction, data.max_resolution, then ghostmask prepare), or a faster disk for data.root",
        )
    return passed(text)


def estimate(patient: Patient) -> Finding:
    """Hours of the whole run, and the most memory of a rank, from what was measured."""
    assert patient.run is not None
    assert patient.data is not None
    hours = seconds(patient.run.phases, patient) / 3600
    world = patient.world
    peak = max(world.all_gather_object(peak_memory_bytes(world.device)))
    if world.device.type == "cuda":
        total, ranks = torch.cuda.get_device_properties(world.device).total_memory, 1
    else:
        total, ranks = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), patient.launch.local_size
    epochs = sum(phase.epochs for phase in patient.run.phases)
    text = (
        f"about {hours:.2g} hours for {epochs} epochs, evaluations included; {peak / 1e9:.1f} GB of "
        f"{total / 1e9:.0f} GB {'GPU ' if world.device.type == 'cuda' else ''}memory a rank"
    )
    return memory(text, ranks * peak, total)


def memory(text: str, used: int, total: int) -> Finding:
    """used, total: bytes."""
    if used > FULL_SHARE * total:
        return warned(text, SMALLER)
    return passed(text)


def seconds(phases: Sequence[Phase], patient: Patient) -> float:
    """Of all steps, at each phase's noise samples and each epoch's size of images, and all evaluations."""
    config, num_eval = patient.config, patient.data.num_eval if patient.data else 0
    per_pass = patient.step_s / patient.passes
    total, side = 0.0, patient.data.image_shape[1] if patient.data else 1
    for phase in phases:
        passes = 1 if phase.name == FINETUNE else patient.passes
        epochs = range(phase.first_epoch, phase.first_epoch + phase.epochs)
        whole = sum((image_side(config.data, side, epoch) / side) ** 2 for epoch in epochs)
        total += whole * phase.steps_per_epoch * per_pass * passes
        evaluations = math.ceil(phase.epochs / config.train.eval_every)
        total += evaluations * num_eval * FORWARD_SHARE * per_pass / config.data.batch_size
    return total


def _affordable(patient: Patient) -> tuple[Batch, float]:
    """Collective: set up the first phase's trainer, and give it a batch; on a CPU maybe a smaller one, which is so many
    times less work."""
    config, pipeline, method = patient.config, patient.data, patient.method
    assert pipeline is not None
    assert method is not None
    batch = _first(pipeline, config)
    size = patient.world.broadcast_object(_images(patient, batch))
    if size < config.data.batch_size:
        smaller = replace(config, data=replace(config.data, batch_size=size))
        pipeline = open_data(smaller, patient.world, patient.shares.plain.parts)
        batch = _first(pipeline, smaller)
    config = replace(config, train=replace(config.train, log_every=10**9))
    patient.store = CheckpointStore(patient.scratch / "checkpoints", patient.world)
    patient.run = assemble_to_read(config, patient.data or pipeline, method, patient.store, patient.shares)
    run = assemble_to_read(config, pipeline, method, patient.store, patient.shares)
    run.recipe = patient.recipe
    for each in (patient.run, run):
        each.reporter.progress.close()  # nothing but the findings is printed
    phase = next(phase for phase in run.phases if phase.epochs > 0)
    patient.trainer = run.trainer(phase, phase.first_step)
    return batch, config.data.batch_size / size


def _first(pipeline: DataPipeline, config: RunConfig) -> Batch:
    """A batch of images that have grown to their full size, which takes most time and memory."""
    with closing(pipeline.train(config.data.grow_until)) as batches:
        return next(batches)


def _images(patient: Patient, batch: Batch) -> int:
    """The batch size; on a CPU at most what a step of LONGEST_STEP_S would take, two images per part at least."""
    config, method = patient.config, patient.method
    size, parts = config.data.batch_size, config.train.replicas
    if patient.world.device.type != "cpu" or method is None:
        return size
    times = []
    with restored(method.net):
        for _ in range(3):  # the first one is slow
            start = perf_counter()
            method.net(batch.images[:2]).sum().backward()
            times.append(perf_counter() - start)
    method.net.zero_grad()
    expected_s = min(times) / 2 * len(batch.labels) * getattr(config.mask, "samples", 1)
    return min(size, max(2, int(size // parts * LONGEST_STEP_S / expected_s)) * parts)
