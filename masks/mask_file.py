"""Masks in files: writes ours, and reads a mask from whatever holds one (our file, a checkpoint's zeros, a dict)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from ghostmask.engine.atomic import replacing
from ghostmask.engine.checkpoint.state_file import read_state_dict
from ghostmask.engine.errors import bad_value

FIELD = "mask.path"


def write_masks(path: Path, masks: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write bool tensors by weight name as safetensors, with `meta` as JSON under the key "ghostmask" of its header.

    The file appears whole or not at all. Call it on one rank.
    """
    tensors = {name: mask.detach().cpu().contiguous() for name, mask in masks.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as writing:
        writing.write_bytes(save(tensors, metadata={"ghostmask": json.dumps(meta, allow_nan=False)}))


def read_masks(path: str, net: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of `weights` (prunable weights of `net` by name) from a file: True where its tensors are not 0.

    path: a .safetensors, a .pt or .pth with a dict of tensors (see `read_state_dict`), or a finished run's folder (its
    export). Names are the weights' own, with or without ".weight" or "_mask". Other tensors of the network, such as
    batch norm's, are passed over. Raises InputError for a file without a mask for some weight, a wrong shape, a name
    that the network does not have, and for zeros in a layer that mask.dense_layers leaves unpruned.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "export" / "model.safetensors"
    # torch.nn.utils.prune saves each pruned weight as NAME_orig, dense, and NAME_mask.
    read = read_state_dict(file, FIELD).items()
    content = {name.removesuffix("_mask"): tensor for name, tensor in read if not name.endswith("_orig")}
    known = set(net.state_dict())
    named = {name if name in known else f"{name}.weight": tensor for name, tensor in content.items()}
    strange = [name for name in content if name not in known and f"{name}.weight" not in known]
    if strange:
        raise bad_value(FIELD, path, f"holds {_few(strange)}, which this network does not have; check model.name")
    missing = [name for name in weights if name not in named]
    if missing:
        raise bad_value(FIELD, path, f"has no mask for {_few(missing)}; leave them unpruned with mask.dense_layers")
    _check_dense(path, net, weights, named)
    masks = {}
    for name, w in weights.items():
        if named[name].shape != w.shape:
            shapes = f"{tuple(named[name].shape)}, the network's is {tuple(w.shape)}"
            raise bad_value(FIELD, path, f"{name} has shape {shapes}; check model.name and the number of classes")
        masks[name] = (named[name] != 0).to(w.device)
    return masks


def _check_dense(path: str, net: nn.Module, weights: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Zeros where this run prunes nothing would be lost without a word."""
    modules = (nn.Conv2d, nn.Linear)
    layers = [f"{name}.weight" for name, module in net.named_modules() if isinstance(module, modules)]
    for name in layers:
        if name not in weights and name in named and bool((named[name] == 0).any()):
            raise bad_value(FIELD, path, f"prunes {name}, which mask.dense_layers keeps dense; take it out of there")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
