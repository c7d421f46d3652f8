"""Do the sections of a configuration fit together, and is every setting read by something?"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ghostmask.engine.config import require
from ghostmask.engine.errors import InputError
from ghostmask.engine.position import Duration
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.values import as_text

READ_BY_METHOD = {
    "dense": set[str](),
    "magnitude": {"density", "dense_layers", "constraint", "path", "min_per_layer"},
    "gmp": {"density", "dense_layers", "constraint", "start_fraction", "end_fraction", "update_every"},
    "probmask": {
        "density", "dense_layers", "constraint", "lr", "samples", "noise", "start_fraction", "end_fraction",
        "temperature_end", "train_weights", "final", "candidates", "gradient_bf16",
    },
    "random": {"density", "dense_layers", "path", "allocation", "min_per_layer"},
    "snip": {
        "density", "dense_layers", "path", "constraint", "min_per_layer", "score_batch", "score_batches",
    },
    "grasp": {
        "density", "dense_layers", "path", "constraint", "min_per_layer", "score_batch", "samples_per_class",
    },
    "synflow": {"density", "dense_layers", "path", "constraint", "min_per_layer", "iterations"},
    "mlprune": {
        "density", "dense_layers", "path", "constraint", "min_per_layer", "score_batch", "score_batches", "damping",
    },
    "lth": {"density", "dense_layers", "constraint", "min_per_layer", "round_fraction", "rewind"},
    "file": {"dense_layers", "path"},
}  # fmt: skip
"""mask.method -> the other settings of `mask` that it reads."""

SEARCHING = ("probmask", "gmp", "lth")
"""Methods that find their mask while the main phase trains."""
FINDERS = ("magnitude", "random", "snip", "grasp", "synflow", "mlprune", "file")
"""Methods that find their mask without training: `ghostmask find-mask` (magnitude: with mask.path)."""
DENSITY_IS_GIVEN = ("dense", "file")
"""Methods whose density is no choice."""
FINETUNED = ("probmask", "magnitude")
"""Methods with a fine-tuning phase after the mask is found."""

READ_BY_TWEAK = {
    "ghost_skip": {"ghost_skip_fraction"},
    "ghost_swish": {"activation", "swish_fraction", "swish_beta_end"},
    "lrsi": {"lrsi_steps", "lrsi_lr", "lrsi_eta", "lrsi_gamma"},
}
"""Tweak of ToST in the main phase -> the other settings of `tost` that it reads."""

READ_BY_DATASET = {
    "synthetic": {"num_train", "num_eval", "num_classes"},
    "imagefolder": {"max_resolution", "jpeg_fraction"},
}
"""data.dataset -> the settings of `data` that no other dataset reads."""


def check_config(config: RunConfig, world_size: int) -> None:
    """Raise InputError where settings contradict each other, or where one is set that this run would not read.

    Needs neither data nor torch. world_size: ranks of the run.
    """
    _check_batch(config, world_size)
    _check_mask(config)
    _check_lengths(config)
    _check_schedule(config)
    _check_tost(config)
    _check_data(config)


def check_finder(config: RunConfig) -> None:
    """Raise InputError unless the method finds its mask without training."""
    method = config.mask.method
    fix = f"finds its mask by training: use ghostmask train; find-mask knows {', '.join(FINDERS)}"
    require(method in FINDERS, "mask.method", method, fix)
    require(
        method != "magnitude" or config.mask.path != "",
        "mask.path", config.mask.path, "name the trained network that mask.method=magnitude prunes",
    )  # fmt: skip


def _check_batch(config: RunConfig, world_size: int) -> None:
    size, accumulation = config.data.batch_size, config.train.accumulation
    unit = world_size * accumulation
    below, above = size // unit * unit, (size // unit + 1) * unit
    require(
        size % unit == 0,
        "data.batch_size", size,
        f"give a multiple of {unit} (ranks {world_size} x train.accumulation {accumulation}), "
        f"such as {f'{below} or {above}' if below else above}",
    )  # fmt: skip


def _check_mask(config: RunConfig) -> None:
    mask, method = config.mask, config.mask.method
    given = _given(mask) - {"method"}
    if method in DENSITY_IS_GIVEN and mask.density == 1:  # what takes back the density of a configuration file
        given -= {"density"}
    for name in sorted(given - READ_BY_METHOD[method]):
        readers = [known for known, names in READ_BY_METHOD.items() if name in names]
        other = "mask.density=1" if name == "density" else f"mask.method={' or '.join(readers)}"
        raise _not_read("mask", mask, name, f"mask.method={method}", other)
    if "candidates" in given and mask.final != "best_of":
        raise _not_read("mask", mask, "candidates", f"mask.final={mask.final}", "mask.final=best_of")
    if mask.gradient_bf16 and config.train.zero_stage == 0:
        raise _not_read("mask", mask, "gradient_bf16", "train.zero_stage=0", "train.zero_stage=1 or 2")
    if method not in FINETUNED and config.finetune.epochs > 0:
        for name in sorted(_given(config.finetune)):
            fix = f"mask.method={' or '.join(FINETUNED)}, or finetune.epochs=0"
            raise _not_read("finetune", config.finetune, name, f"mask.method={method}", fix)
    if not mask.train_weights:
        _check_supermask(config)


def _check_supermask(config: RunConfig) -> None:
    chosen, fix = "mask.train_weights=false", "mask.train_weights=true"
    unread = set() if config.tost.ghost_skip else {"lr", "momentum", "nesterov", "weight_decay"}  # ghosts are trained
    for name in sorted(_given(config.optim) & unread):
        raise _not_read("optim", config.optim, name, chosen, fix)
    if config.finetune.epochs > 0:
        for name in sorted(_given(config.finetune)):
            raise _not_read("finetune", config.finetune, name, chosen, f"{fix}, or finetune.epochs=0")


def _check_lengths(config: RunConfig) -> None:
    method, epochs, optim = config.mask.method, config.train.epochs, config.optim
    require(
        epochs > 0 or method not in SEARCHING,
        "train.epochs", epochs, f"mask.method={method} finds its mask while it trains; give 1 or more",
    )  # fmt: skip
    if config.mask.path and method in FINETUNED:
        _check_without_main_phase(config)
    late = [milestone for milestone in optim.milestones if milestone >= epochs]
    require(
        not late or optim.schedule != "step",
        "optim.milestones", list(optim.milestones), f"train.epochs = {epochs} ends before {late}; leave that out",
    )  # fmt: skip
    warmup = Duration.parse(optim.warmup, "optim.warmup")
    require(
        warmup.amount == 0 or (epochs > 0 and (warmup.unit != "ep" or warmup.amount <= epochs)),
        "optim.warmup", optim.warmup, f"is longer than train.epochs = {epochs}; give at most that",
    )  # fmt: skip


def _check_without_main_phase(config: RunConfig) -> None:
    require(
        config.train.epochs == 0 or "epochs" not in _given(config.train),
        "train.epochs", config.train.epochs, "mask.path replaces the dense training; set train.epochs=0",
    )  # fmt: skip
    for name in sorted(_given(config.optim) & {"lr", "schedule", "warmup", "milestones", "gamma"}):
        raise _not_read("optim", config.optim, name, f"mask.path={config.mask.path}", "finetune.lr, finetune.schedule")


def _check_schedule(config: RunConfig) -> None:
    optim = config.optim
    if optim.schedule != "step":
        for name in sorted(_given(optim) & {"milestones", "gamma"}):
            raise _not_read("optim", optim, name, f"optim.schedule={optim.schedule}", "optim.schedule=step")


def _check_tost(config: RunConfig) -> None:
    tost, given = config.tost, _given(config.tost)
    for switch, names in READ_BY_TWEAK.items():
        for name in sorted(given & names) if not getattr(tost, switch) else ():
            raise _not_read("tost", tost, name, f"tost.{switch}=false", f"tost.{switch}=true")
    if "swish_beta_end" in given and tost.activation != "pswish":
        raise _not_read("tost", tost, "swish_beta_end", f"tost.activation={tost.activation}", "tost.activation=pswish")
    without = config.train.epochs == 0 or (config.mask.method == "magnitude" and config.mask.path)
    for switch in sorted(given & set(READ_BY_TWEAK)) if without else ():
        chosen = "train.epochs=0" if config.train.epochs == 0 else f"mask.path={config.mask.path}"
        raise _not_read("tost", tost, switch, chosen, "a method with a main phase")


def _check_data(config: RunConfig) -> None:
    data = config.data
    for dataset, names in READ_BY_DATASET.items():
        for name in sorted(_given(data) & names) if data.dataset != dataset else ():
            raise _not_read("data", data, name, f"data.dataset={data.dataset}", f"data.dataset={dataset}")


def _given(section: Any) -> set[str]:
    """The settings of a section that are not at their default: someone set them and expects them to be read."""
    defaults = type(section)()
    return {field.name for field in fields(section) if getattr(section, field.name) != getattr(defaults, field.name)}


def _not_read(section: str, values: Any, name: str, chosen: str, alternative: str) -> InputError:
    value = as_text(getattr(values, name))
    return InputError(f"{section}.{name} = {value}: is not read with {chosen}; leave it out, or use {alternative}")
