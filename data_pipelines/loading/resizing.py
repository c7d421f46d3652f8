"""How large are the training images of an epoch? Progressive resizing, as in FFCV's ImageNet recipe."""

from __future__ import annotations

from ghostmask.data_pipelines.config import DataConfig
from ghostmask.data_pipelines.source import Source
from ghostmask.engine.errors import bad_value

MULTIPLE = 32
"""Sides grow by so many pixels at once: as much as a ResNet shrinks images."""


def image_side(config: DataConfig, full: int, epoch: int) -> int:
    """Side of the training images of the run's `epoch`: data.start_size before data.grow_from, `full` from
    data.grow_until on, and between them the nearest of start_size, start_size + 32, ... to a straight line."""
    start, grown = config.start_size, epoch - config.grow_from
    if not start or epoch >= config.grow_until:
        return full
    span = MULTIPLE * (config.grow_until - config.grow_from)
    return start + MULTIPLE * ((2 * max(0, grown) * (full - start) + span) // (2 * span))


def check_resizing(config: DataConfig, source: Source) -> None:
    """Raise InputError where data.start_size does not fit the dataset, or its images are not resized at all."""
    for name in ("start_size", "fast_decode"):
        if getattr(config, name) and not source.augmentation.resized_crop:
            fix = f"images of {config.dataset} have one size; leave it out"
            raise bad_value(f"data.{name}", getattr(config, name), fix)
    if config.start_size >= source.image_size:
        fix = f"give a multiple of {MULTIPLE} below the images' own side, {source.image_size}"
        raise bad_value("data.start_size", config.start_size, fix)
