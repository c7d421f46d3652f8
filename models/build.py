"""Builds the network of a configuration: the same weights for the same seed, whatever was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ghostmask.engine.errors import bad_value
from ghostmask.engine.registry import resolve
from ghostmask.models.blurpool import blurpool
from ghostmask.models.config import ModelConfig
from ghostmask.models.foreign import check_network, find_builder, output_of
from ghostmask.models.registry import MODELS
from ghostmask.models.residual import zero_init_last


def build_model(config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int], seed: int) -> nn.Module:
    """The network `config.name` for a dataset of num_classes classes, float32, on the CPU, in training mode.

    image_shape: (channels, height, width) of the dataset. The initialisation is a function of seed alone, equal on
    every rank; the global generators are left as they were. Raises InputError where config.num_classes is not the
    dataset's, where the images are too small for the network, and for what is wrong with a network that is not ours
    (models.foreign).
    """
    if config.num_classes not in (0, num_classes):
        raise bad_value(
            "model.num_classes", config.num_classes, f"the dataset has {num_classes} classes; use {num_classes} or 0"
        )
    with _seeded(seed), torch.device("cpu"):
        if config.name in MODELS:
            net: nn.Module = resolve(MODELS[config.name])(num_classes, image_shape)
        else:
            found = find_builder(config.name)(num_classes, image_shape)
            net = check_network(found, config.name, num_classes, image_shape)
        if config.zero_init_last:
            zero_init_last(net)
        return blurpool(net) if config.blurpool else net


def check_part(net: nn.Module, image_shape: tuple[int, int, int], batch_size: int, parts: int) -> None:
    """Raise the InputError of data.batch_size where a part of the batch is one image and batch norm cannot train on it:
    its last feature map is one pixel. Parameters and buffers stay as they are."""
    if batch_size > parts:
        return
    try:
        output_of(net, image_shape, "meta", images=1)
    except ValueError as error:
        why = f"each of {parts} parts (train.replicas) has one image, on which the network cannot train ({error})"
        raise bad_value("data.batch_size", batch_size, f"{why}; give at least {2 * parts}") from None
    except Exception:  # such as a branch on a value, which the meta device does not have
        return


def check_side(net: nn.Module, image_shape: tuple[int, int, int], field: str, side: int) -> None:
    """Raise the InputError of `field` where the network takes images of image_shape, but none of this side."""
    try:
        output_of(net, image_shape, "meta")
    except Exception:  # such as a branch on a value, which the meta device does not have
        return
    try:
        output_of(net, (image_shape[0], side, side), "meta")
    except Exception as error:
        why = f"the network takes images of {image_shape[1]} x {image_shape[2]} only ({error}); give no other size"
        raise bad_value(field, side, f"{why}, or a network that averages over its last feature map") from None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators of torch (CPU), numpy and Python start from `seed`; then they go on as before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed CUDA's generators too, which fork_rng(devices=[]) does not restore.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
