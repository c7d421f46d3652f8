"""Which hooks does a configuration ask for that change what a step is computed on: mixed images, a teacher's logits?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ghostmask.data_pipelines.open import describe
from ghostmask.engine.checkpoint.state_file import read_state_dict
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.distill import Distillation
from ghostmask.engine.errors import bad_value
from ghostmask.engine.hooks import Hook
from ghostmask.engine.mixing import Mixing
from ghostmask.engine.randaugment import RandAugmenting
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.folder import read_run
from ghostmask.masks.mask_file import fill, weights_file
from ghostmask.models.build import build_model

FIELD = "distill.path"


def recipe_hooks(config: RunConfig, data: DataPipeline, world: World) -> tuple[Hook, ...]:
    """In the order in which they act on a part of the batch. config.train.replicas is settled.

    Raises InputError for a teacher that is missing, damaged or another network, and for parts of one image, which
    cannot be mixed.
    """
    hooks: list[Hook] = []
    if config.augment.randaugment:
        info = describe(config.data)
        hooks.append(RandAugmenting(config.augment, info.mean, info.std, config.seed))
    if config.augment.mixes:
        if data.batch_size // config.train.replicas < 2:
            name = "mixup" if config.augment.mixup else "cutmix"
            fix = f"each of {config.train.replicas} parts of the batch (train.replicas) has one image; give fewer parts"
            raise bad_value(f"augment.{name}", getattr(config.augment, name), fix)
        hooks.append(Mixing(config.augment, data.num_classes, config.seed))
    if config.distill.path:
        hooks.append(_teacher(config, data, world))
    return tuple(hooks)


def _teacher(config: RunConfig, data: DataPipeline, world: World) -> Distillation:
    path = config.distill.path
    file, model = weights_file(path), config.model
    if not file.is_file():
        raise bad_value(FIELD, path, f"{file} is missing; give a finished run's folder or a file with weights")
    if (Path(path) / "config.yaml").is_file():
        model = read_run(Path(path)).model
    model = replace(model, name=config.distill.model or model.name, num_classes=0, zero_init_last=False)
    net = build_model(model, data.num_classes, data.image_shape, config.seed)
    fill(net, read_state_dict(file, FIELD, net.state_dict()), FIELD, path)
    net.requires_grad_(False)
    return Distillation(net.to(world.device).eval(), path)
