"""ghostmask evaluate: the accuracy of a run's exported network, measured afresh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ghostmask.engine.errors import InputError, output
from ghostmask.engine.evaluation import Score, score
from ghostmask.engine.world import connect
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.export import accuracies, load_export, summarise, use
from ghostmask.launcher.folder import read_run
from ghostmask.launcher.run import open_data
from ghostmask.launcher.settings import to_dict
from ghostmask.launcher.summary import closing_table
from ghostmask.masks.mask_file import fill
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model

FIELD = "RUN"


def evaluate(run: Path, *, as_json: bool = False) -> int:
    """Print the summary of RUN/export/model.safetensors on its evaluation images, which any number of ranks share."""
    config = read_run(run)
    file = run / "export" / "model.safetensors"
    if not file.is_file():
        raise InputError(
            f"RUN = {str(run)!r}: there is no {file}; finish the run, or write it with: ghostmask export {run}"
        )
    with connect(config.train.device, config.train.timeout_minutes) as world:
        data = open_data(config, world)
        net = build_model(config.model, data.num_classes, data.image_shape, config.seed)
        fill(net, load_export(file, FIELD), FIELD, str(file))
        net.to(world.device).eval()
        result = score(net, data.evaluate(), world, config.train.precision, flip=config.train.eval_flip)
        summary = _summary(config, net, data.image_shape, result)
        data.close()
        if world.is_main:
            output(json.dumps(summary) if as_json else closing_table(summary, run, file.parent, 0.0))
        world.barrier()
    return 0


def _summary(config: RunConfig, net: torch.nn.Module, shape: tuple[int, int, int], result: Score) -> dict[str, Any]:
    weights = prunable_weights(net, config.mask.dense_layers, config.mask.only)
    masks = {} if config.mask.method == "dense" else {name: w.detach() != 0 for name, w in weights.items()}
    found = {**accuracies(result.accuracy, result.top5), "preprocessing": use(config)}
    return {**found, **summarise(net, masks, shape), "config": to_dict(config)}
