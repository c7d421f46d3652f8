"""What mask.path names: masks (our file, a checkpoint's zeros, a dict), or a trained network to start from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ghostmask.engine.atomic import replacing
from ghostmask.engine.checkpoint.state_file import read_state_dict, values_of
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

    path: a file with tensors of any number type (see `read_state_dict`), or a finished run's folder (its export). Names
    are the weights' own, with or without ".weight" or "_mask"; where a mask stands beside its weight, the mask counts.
    Other tensors of the network, such as batch norm's, are passed over. Raises InputError for a file without a mask
    for some weight or with two, a wrong shape, a name that the network does not have, values that are not finite, a
    mask that keeps nothing, and for zeros in a layer that mask.dense_layers leaves unpruned.
    """
    named = _by_weight(path, read_state_dict(weights_file(path), FIELD, net.state_dict()), net.state_dict())
    missing = [name for name in weights if name not in named]
    if missing:
        raise bad_value(FIELD, path, f"has no mask for {_few(missing)}; leave them unpruned with mask.dense_layers")
    layers = [f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    # Of the layers that this run does not prune: zeros there would be lost without a word.
    dense = [name for name in layers if name in named and name not in weights]
    for name in (*weights, *dense):
        found, own = tuple(named[name].shape), tuple(net.get_parameter(name).shape)
        if found != own:
            fix = "check model.name and the number of classes"
            raise bad_value(FIELD, path, f"{name} has shape {found}, the network's is {own}; {fix}")
    for name in dense:
        if bool((values_of(named[name], name, path, FIELD) == 0).any()):
            raise bad_value(FIELD, path, f"prunes {name}, which mask.dense_layers keeps dense; take it out of there")
    masks = {n: (values_of(named[n], n, path, FIELD) != 0).to(w.device) for n, w in weights.items()}
    if not any(bool(mask.any()) for mask in masks.values()):
        raise bad_value(FIELD, path, "keeps no weight at all: every value in it is 0")
    return masks


def load_trained(net: nn.Module, path: str) -> None:
    """Fill `net` from a run folder (its export), or a file with a state dict (`read_state_dict`).

    Raises InputError, also for a weight that is nan or infinite.
    """
    file = weights_file(path)
    if not os.path.exists(file):
        raise bad_value(FIELD, path, f"{file} is missing; give a finished run's folder or a file with weights")
    fill(net, read_state_dict(file, FIELD, net.state_dict()), FIELD, path)


def fill(net: nn.Module, state: Mapping[str, Tensor], field: str, path: str) -> None:
    """Give `net` the weights of a state dict from `path`, named by `field` in the InputError for one that is another
    network's, or that holds nan or infinite values."""
    own = net.state_dict()
    state = {  # not before the shape is known: a few bytes of a file can claim any
        n: t.to_dense() if t.layout != torch.strided and n in own and own[n].shape == t.shape else t
        for n, t in state.items()
    }
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise bad_value(field, path, f"does not hold this network's weights ({reason})") from None
    for name, value in net.state_dict().items():
        values_of(value, name, path, field)


def weights_file(path: str) -> Path:
    """The file that mask.path means: of a finished run's folder its export, else itself."""
    file = Path(path)
    return file / "export" / "model.safetensors" if file.is_dir() else file


def _by_weight(path: str, content: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's names -> what the file says of them: a mask beside it before the weight itself."""
    found: dict[str, tuple[int, str]] = {}
    strange = []
    for name in content:
        # torch.nn.utils.prune saves each pruned weight as NAME_orig, dense, and NAME_mask.
        base = name if name in known else name.removesuffix("_mask")
        if base not in known and name.endswith("_orig"):
            continue
        own = base if base in known else f"{base}.weight"
        if own not in known:
            strange.append(name)
            continue
        rank = int(base != name)
        other = found.get(own, (-1, ""))
        if rank == other[0]:
            raise bad_value(FIELD, path, f"holds both {other[1]} and {name}, for one weight; leave one of them out")
        found[own] = max(other, (rank, name))
    if strange:
        raise bad_value(FIELD, path, f"holds {_few(strange)}, which this network does not have; check model.name")
    return {own: content[name] for own, (_, name) in found.items()}


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
