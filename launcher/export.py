"""What a finished run leaves for the world: a plain state dict with zeros where the mask is zero, and its summary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ghostmask.data_pipelines.open import preprocessing
from ghostmask.engine.atomic import replace_files
from ghostmask.engine.checkpoint.state_file import read_state_dict
from ghostmask.engine.errors import InputError
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.exporting import card, network_file
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.report import removed_units
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig
from ghostmask.models.flops import layer_flops

MODEL_FILE = "model.safetensors"
SUMMARY_FILE = "summary.json"


def write_export(
    folder: Path,
    net: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    accuracy: float | None,
    image_shape: tuple[int, int, int],
    config: dict[str, Any],
    top5: float | None = None,
    usage: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    mark: str = "",
) -> dict[str, Any]:
    """Write folder/model.safetensors and folder/summary.json, and return the summary; `net` stays as it is.

    net: the mask-free network. masks: bool tensors by weight name, as `prunable_weights` names them; empty for a dense
    network. accuracy: evaluation accuracy in [0, 1], None where there was no evaluation; top5: as
    Score's. config: the resolved configuration, JSON-able. usage: what is done to an image before the network sees it
    (see `use`), written as "preprocessing". facts: "network", "run", "data" and "versions" (docs/export.md), without
    which there is no model card. mark: see engine.atomic.replacing. Call it on one rank. A kill leaves
    all earlier files, all new ones, or no summary (see engine.atomic.replace_files). Raises ValueError for a mask that
    fits no weight.
    """
    known = {} if usage is None else {"preprocessing": usage}
    # Not save_file: it makes the file unreadable for everybody else (mode 0600), whatever the umask is.
    content = save(masked_state(net, masks))
    file = {"name": MODEL_FILE, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    summary = {
        **accuracies(accuracy, top5), **known, **summarise(net, masks, image_shape), **(facts or {}), "file": file,
        "config": config,
    }  # fmt: skip
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    texts = _beside(summary) if facts else {}
    folder.mkdir(parents=True, exist_ok=True)
    words = {name: text.encode() for name, text in {**texts, SUMMARY_FILE: text}.items()}
    replace_files(folder, {MODEL_FILE: content, **words}, mark)
    return summary


def _beside(summary: dict[str, Any]) -> dict[str, str]:
    """The model card and, for a network that is not torchvision's, a file that builds it, by name."""
    texts: dict[str, str] = {}
    network = summary["network"]
    if not card.torchvision_builds(summary["config"]):
        title = f"The network {network['name']}, as ghostmask trained it."
        classes, shape = network["num_classes"], network["image_shape"]
        with suppress(InputError):  # the card says then what else builds it
            net = build_model(ModelConfig(**summary["config"]["model"]), classes, (shape[0], shape[1], shape[2]), 0)
            texts[network_file.FILE] = network_file.network_source(net, title, shape, classes)
    load = card.plain_load(summary, bool(texts))
    texts[card.FILE] = card.card(summary, load, [MODEL_FILE, SUMMARY_FILE, *texts], sources=list(texts.values()))
    return texts


def use(config: RunConfig) -> dict[str, Any]:
    """What whoever uses the network must do too, to get the accuracy that is reported: `preprocessing` of the data and

    mirrored: whether logits are the mean of those of an image and its mirror image; blurpool: whether the network needs
    models.blurpool's filters.
    """
    return {
        **preprocessing(config.data),
        "mirrored": config.train.eval_flip,
        "blurpool": config.model.blurpool,
    }


def network_facts(net: nn.Module, config: RunConfig, num_classes: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Of the network itself: name, num_classes, image_shape (of an evaluation image), parameters (how many)."""
    count = sum(parameter.numel() for parameter in net.parameters())
    return {"name": config.model.name, "num_classes": num_classes, "image_shape": list(shape), "parameters": count}


def accuracies(accuracy: float | None, top5: float | None) -> dict[str, float | None]:
    """What a summary says of them; nothing of top-5 accuracy where it means nothing."""
    return {"accuracy": accuracy} | ({} if top5 is None else {"top5": top5})


def summarise(net: nn.Module, masks: Mapping[str, Tensor], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The numbers of a sparse network: density, kept, prunable, flops_dense, flops_sparse, layers.

    prunable: weights under a mask (without masks: all weights of convolutions and linear layers); kept: ones of the
    masks; density: kept / prunable; flops: of one image of image_shape, see `count_flops`; layers: name, shape, kept,
    density and flops of each masked weight and how many of its output channels keep none, in module order. Raises
    ValueError for a mask that fits no weight.
    """
    _check(net, masks)
    weights = {name: w for name, w in prunable_weights(net).items() if name in masks or not masks}
    kept = {name: int(masks[name].sum()) if masks else w.numel() for name, w in weights.items()}
    flops = layer_flops(net, image_shape, kept)
    layers = [
        {
            "name": name, "shape": list(w.shape), "kept": kept[name], "density": kept[name] / w.numel(),
            "flops_dense": flops.get(name, (0, 0))[0], "flops_sparse": flops.get(name, (0, 0))[1],
            "channels_removed": removed_units(masks[name]) if masks else 0,
        }
        for name, w in weights.items()
    ]  # fmt: skip
    num_prunable, num_kept = sum(w.numel() for w in weights.values()), sum(kept.values())
    dense, sparse = (sum(pair[i] for pair in flops.values()) for i in (0, 1))
    return {
        "density": num_kept / num_prunable,
        "kept": num_kept,
        "prunable": num_prunable,
        "flops_dense": dense,
        "flops_sparse": sparse,
        "layers": layers,
    }


def masked_state(net: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `net` as contiguous CPU copies, with +0.0 wherever a mask is False."""
    _check(net, masks)
    state: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        value = tensor.detach()
        if name in masks:
            # torch.where and not a product: w * 0 is -0.0 for a negative w and nan for an infinite one.
            value = torch.where(masks[name].to(value.device), value, torch.zeros_like(value))
        state[name] = value.cpu().clone(memory_format=torch.contiguous_format)
    return state


def load_export(path: Path, field: str = "mask.path") -> dict[str, Tensor]:
    """Name -> CPU tensor of an exported .safetensors, or of a .pt or .pth with a state dict.

    Raises InputError of `field` for any other file and for a broken one.
    """
    return read_state_dict(path, field)


def _check(net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    weights = prunable_weights(net)
    for name, mask in masks.items():
        if name not in weights or mask.shape != weights[name].shape or mask.dtype != torch.bool:
            raise ValueError(f"mask {name}: {mask.dtype} {tuple(mask.shape)} fits no prunable weight of the network")
