"""ghostmask find-mask: find the mask that a run would train with, and write it to a file instead."""

from __future__ import annotations

from pathlib import Path

from ghostmask.engine.errors import output, say
from ghostmask.engine.sharding.replicas import share
from ghostmask.engine.world import connect
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.run import build_method, open_data, settle
from ghostmask.launcher.settings import to_dict
from ghostmask.masks.mask_file import write_masks
from ghostmask.masks.masked import density_of
from ghostmask.masks.one_shot import OneShot


def find_mask(config: RunConfig, out: Path) -> int:
    """Write the masks of `config`, whose method is one that finds it without training, to `out` (safetensors of bools);
    returns exit code 0.

    The ranks share the data. Loaded with mask.method=file, the file gives bit-identical masks.
    """
    with connect(config.train.device, config.train.timeout_minutes) as world:
        config = settle(config, world)
        data = open_data(config, world, share(world, config.train.replicas).parts)
        method = build_method(config, world, data)
        assert isinstance(method, OneShot)  # launcher.checks.check_finder
        method.prepare()
        world.pulse.enter(f"finding the mask: {config.mask.method}")
        masks = method.find(data)
        data.close()
        method.settle(masks, say if world.is_main else lambda line: None, method.counts())
        if world.is_main:
            meta = {"method": config.mask.method, "density": density_of(masks), "config": to_dict(config)}
            write_masks(out, masks, meta)
            output(str(out))
        world.barrier()
    return 0
