"""Do the sections of a configuration fit together, and is every setting read by something?"""

from __future__ import annotations

import math

from ghostmask.engine.config import require
from ghostmask.engine.launch import read_launch
from ghostmask.engine.position import Duration, require_steps
from ghostmask.engine.sharding.ranks import check_ranks, most_ranks
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.methods import method_of, methods
from ghostmask.masks.settings import FromTrained
from ghostmask.models.names import check_name

READ_BY_TWEAK = {
    "ghost_skip": {"ghost_skip_fraction"},
    "ghost_swish": {"activation", "swish_fraction", "swish_beta_end"},
    "lrsi": {"lrsi_steps", "lrsi_lr", "lrsi_eta", "lrsi_gamma", "lrsi_normalize"},
}
"""Tweak of ToST in the main phase -> the other settings of `tost` that it reads."""

PHOTOGRAPHS = {
    "max_resolution", "jpeg_fraction", "eval_size", "eval_resize", "interpolation", "exif", "val_fraction", "val_seed",
    "bad_images",
}  # fmt: skip
READ_BY_DATASET = {
    "cifar10": {"subset"},
    "cifar100": {"subset"},
    "synthetic": {"num_train", "num_eval", "num_classes"},
    "imagefolder": PHOTOGRAPHS | {"val_labels"},
    "imagenet": PHOTOGRAPHS | {"val_labels"},
    "webdataset": PHOTOGRAPHS,
}
"""data.dataset -> the settings of `data` that only it, or some of those here, read."""


def check_config(config: RunConfig, world_size: int) -> None:
    """Raise InputError where settings contradict each other, or where one is set that this run would not read.

    Needs neither data nor torch. world_size: ranks of the run.
    """
    _check_batch(config, world_size)
    _check_mask(config)
    _check_lengths(config)
    _check_schedule(config)
    _check_recipe(config)
    _check_tost(config)
    check_data(config)


def check_reader(config: RunConfig, world_size: int) -> None:
    """As check_config, for a command that goes through a run's batches and trains nothing: only its ranks must fit."""
    if config.train.replicas:
        check_ranks(config.train.replicas, config.noises, world_size)


def check_data(config: RunConfig) -> None:
    """Raise InputError for a setting of `data` that its data set, or its loader, would not read."""
    data = config.data
    read = READ_BY_DATASET.get(data.dataset, set())
    for dataset, names in READ_BY_DATASET.items():
        for name in sorted((config.given("data") & names) - read):
            raise config.not_read("data", name, f"data.dataset={data.dataset}", f"data.dataset={dataset}")
    for name in sorted(config.given("data") & {"grow_from", "grow_until"}) if not data.start_size else ():
        raise config.not_read("data", name, "data.start_size=0", "data.start_size=160")
    if "window_pages" in config.given("data") and data.order != "quasi_random":
        raise config.not_read("data", "window_pages", f"data.order={data.order}", "data.order=quasi_random")
    if "val_seed" in config.given("data") and not data.val_fraction:
        raise config.not_read("data", "val_seed", "data.val_fraction=0", "data.val_fraction=0.1")


def check_steps(config: RunConfig, steps_per_epoch: int) -> None:
    """Raise InputError where a schedule of a new run does not fit into the steps that its data gives it."""
    total = config.train.epochs * steps_per_epoch
    require_steps("optim.warmup", config.optim.warmup, steps_per_epoch, total, "the main phase has")
    tost = config.tost
    require(
        not tost.ghost_swish or tost.activation == "pswish" or tost.swish_fraction * total <= total - 1,
        "tost.swish_fraction", tost.swish_fraction, f"leaves none of {total} steps to train ReLUs in; give less",
    )  # fmt: skip
    method_of(config.mask.method).check_steps(config.mask, config, steps_per_epoch)


def check_finder(config: RunConfig) -> None:
    """Raise InputError unless the method finds its mask without training."""
    from ghostmask.masks.one_shot import OneShot  # imports torch

    method = config.mask.method
    finders = {name: found for name, found in methods().items() if issubclass(found, OneShot)}
    fix = f"finds its mask by training: use ghostmask train; find-mask knows {', '.join(finders)}"
    require(method in finders, "mask.method", method, fix)
    finders[method].check_find(config.mask)


def _check_batch(config: RunConfig, world_size: int) -> None:
    size, parts, noises = config.data.batch_size, config.train.replicas, config.noises
    if parts:
        restarts = read_launch().restarts  # then those that do not fit wait: see launcher.spare
        check_ranks(parts, noises, most_ranks(parts, noises, world_size) if restarts else world_size)
        unit, why = parts, f"train.replicas {parts}"
    else:
        fix = f"give a divisor or a multiple of the number of ranks, {world_size}"
        require(world_size % noises == 0 or noises % world_size == 0, "mask.noises", noises, fix)
        unit, why = math.lcm(world_size, noises), f"ranks {world_size}"
        why += f", mask.noises {noises}" if noises > 1 else ""
    below, above = size // unit * unit, (size // unit + 1) * unit
    require(
        size % unit == 0,
        "data.batch_size", size,
        f"give a multiple of {unit} ({why}), such as {f'{below} or {above}' if below else above}",
    )  # fmt: skip


def _check_mask(config: RunConfig) -> None:
    mask, method = config.mask, method_of(config.mask.method)
    if not method.finetunes and config.finetune.epochs > 0:
        tuned = [name for name, found in methods().items() if found.finetunes]
        for name in sorted(config.given("finetune")):
            fix = f"mask.method={' or '.join(tuned)}, or finetune.epochs=0"
            raise config.not_read("finetune", name, f"mask.method={mask.method}", fix)
    method.check(mask, config)


def _check_lengths(config: RunConfig) -> None:
    method, epochs, optim = config.mask.method, config.train.epochs, config.optim
    require(
        epochs > 0 or not method_of(method).searches,
        "train.epochs", epochs, f"mask.method={method} finds its mask while it trains; give 1 or more",
    )  # fmt: skip
    late = [milestone for milestone in optim.milestones if milestone >= epochs]
    require(
        not late or optim.schedule != "step",
        "optim.milestones", list(optim.milestones), f"train.epochs = {epochs} ends before {late}; leave that out",
    )  # fmt: skip
    grown = config.data.grow_until
    require(grown <= epochs, "data.grow_until", grown, f"train.epochs = {epochs} ends before; give at most that")
    warmup = Duration.parse(optim.warmup, "optim.warmup")
    require(
        warmup.amount == 0 or (epochs > 0 and (warmup.unit != "ep" or warmup.amount <= epochs)),
        "optim.warmup", optim.warmup, f"is longer than train.epochs = {epochs}; give at most that",
    )  # fmt: skip


def _check_schedule(config: RunConfig) -> None:
    optim = config.optim
    if optim.schedule != "step":
        for name in sorted(config.given("optim") & {"milestones", "gamma"}):
            raise config.not_read("optim", name, f"optim.schedule={optim.schedule}", "optim.schedule=step")


def _check_recipe(config: RunConfig) -> None:
    optim, mask, given = config.optim, config.mask, config.given("optim")
    if "decay_norms" in given and optim.weight_decay == 0:
        raise config.not_read("optim", "decay_norms", "optim.weight_decay=0", "a weight decay")
    if "lars_trust" in given and not optim.lars:
        raise config.not_read("optim", "lars_trust", "optim.lars=false", "optim.lars=true")
    if "magnitude" in config.given("augment") and not config.augment.randaugment:
        raise config.not_read("augment", "magnitude", "augment.randaugment=0", "augment.randaugment=2")
    if "mix_fraction" in config.given("augment") and not config.augment.mixes:
        raise config.not_read("augment", "mix_fraction", "augment.mixup=0 and augment.cutmix=0", "one of them")
    for name in sorted(config.given("distill")) if not config.distill.path else ():
        raise config.not_read("distill", name, "distill.path=", "distill.path=RUN")
    if config.distill.model:
        check_name(config.distill.model, "distill.model")
    method = method_of(mask.method)
    fix = "give fine-tuning epochs (finetune.epochs, mask.train_weights=true), or 0" if method.finetunes else "give 0"
    require(
        config.ema.decay == 0 or method.ends_under_one_mask(mask, config),
        "ema.decay", config.ema.decay,
        f"averages weights under one mask, and a search trains under a new one at every step; {fix}",
    )  # fmt: skip
    if config.model.zero_init_last:
        if isinstance(mask, FromTrained) and mask.path:
            raise config.not_read("model", "zero_init_last", f"mask.path={mask.path}", "a run from the initialisation")
        blind = f"mask.method={mask.method}" if method.blind_at_zero else "tost.lrsi" if config.tost.lrsi else ""
        fix = f"{blind} looks at the initialisation, where no gradient passes a batch norm of weight 0; give false"
        require(not blind, "model.zero_init_last", True, fix)


def _check_tost(config: RunConfig) -> None:
    tost, given = config.tost, config.given("tost")
    for switch, names in READ_BY_TWEAK.items():
        for name in sorted(given & names) if not getattr(tost, switch) else ():
            raise config.not_read("tost", name, f"tost.{switch}=false", f"tost.{switch}=true")
    if "swish_beta_end" in given and tost.activation != "pswish":
        raise config.not_read("tost", "swish_beta_end", f"tost.activation={tost.activation}", "tost.activation=pswish")
    for switch in sorted(given & set(READ_BY_TWEAK)) if config.train.epochs == 0 else ():
        raise config.not_read("tost", switch, "train.epochs=0", "a method with a main phase")
    trains = config.train.epochs > 0 or (method_of(config.mask.method).finetunes and config.finetune.epochs > 0)
    if tost.label_smoothing and not trains:
        raise config.not_read("tost", "label_smoothing", "no epochs", "train.epochs or a method's finetune.epochs")
