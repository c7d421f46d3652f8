"""What does the README.md beside an exported network say: a model card, with Hugging Face's header?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ghostmask import __version__
from ghostmask.models.registry import MODELS

FILE = "README.md"
HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}
"""What Hugging Face calls our data sets."""
TORCHVISION = ("resnet18", "resnet50")
"""Networks of ours that are torchvision's own."""
PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "safetensors": "safetensors", "numpy": "numpy",
    "onnxruntime": "onnxruntime", "coremltools": "coremltools on a Mac", "ghostmask": "ghostmask",
}  # fmt: skip
"""What lines that load a network may import -> what a reader has to have."""


def torchvision_builds(config: Mapping[str, Any]) -> bool:
    """Whether torchvision by itself builds the network of a configuration."""
    model = config["model"]
    own = model["name"] in MODELS or ":" in model["name"]
    return (model["name"] in TORCHVISION or not own) and not model["blurpool"]


def plain_load(summary: Mapping[str, Any], has_file: bool) -> str:
    """Lines that define `net` from model.safetensors: by torchvision, by network.py where there is one, or by ghostmask
    for what no file could be written of."""
    classes = summary["network"]["num_classes"]
    name = summary["network"]["name"]
    if torchvision_builds(summary["config"]):
        build, make = "from torchvision.models import get_model", f'get_model("{name}", num_classes={classes})'
    elif has_file:
        build, make = "from network import Network", "Network()"
    else:
        build = "from ghostmask.models.build import build_model\nfrom ghostmask.models.config import ModelConfig"
        shape = tuple(summary["network"]["image_shape"])
        model = f"ModelConfig({name!r}, blurpool={summary['config']['model']['blurpool']})"
        make = f"build_model({model}, {classes}, {shape}, 0)"
    return (
        f"from safetensors.torch import load_file\n{build}\n\nnet = {make}\n"
        'net.load_state_dict(load_file("model.safetensors"))\nnet.eval()'
    )


def card(
    summary: Mapping[str, Any], load: str, files: Sequence[str], notes: Sequence[str] = (), *,
    loads: Mapping[str, str] | None = None, sources: Sequence[str] = (),
) -> str:  # fmt: skip
    """The text. summary: of summary.json, with what only a whole run knows; load: lines of Python that define `net`;
    files: names of what lies beside the card; notes: sentences on this format; loads: other lines that define `net`, by
    what they are called; sources: what these lines import from files beside the card, which needs packages too."""
    network, data = summary["network"], summary["config"]["data"]["dataset"]
    title = f"{network['name']}, {1 - summary['density']:.2%} sparse, on {data}"
    parts = [
        _header(summary, title),
        f"# {title}",
        _sentence(summary),
        _facts(summary),
        f"## Load\n\nNeeds {_needs(load, *sources)}; in this folder:\n\n```python\n{load}\n```",
        *(f"Or, as {name} (needs {_needs(own)}):\n\n```python\n{own}\n```" for name, own in (loads or {}).items()),
        "\n".join([f"Files: {', '.join(f'`{name}`' for name in files)}.", *notes]),
        f"## Images\n\n{_images(summary)}",
        f"## Classes\n\n{_classes(summary)}",
        f"## Layers\n\n{_layers(summary)}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(summary: Mapping[str, Any], title: str) -> str:
    data = summary["config"]["data"]["dataset"]
    metrics = [
        {"type": "accuracy", "name": name, "value": round(summary[key], 6)}
        for key, name in (("accuracy", "Top-1 accuracy"), ("top5", "Top-5 accuracy"))
        if summary.get(key) is not None
    ]
    header: dict[str, Any] = {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "sparse", "pruning", "ghostmask"],
    }
    if data in HUB_NAMES:
        header["datasets"] = [HUB_NAMES[data]]
    if metrics:
        header["metrics"] = ["accuracy"]
        task = {"type": "image-classification", "name": "Image classification"}
        dataset = {"type": HUB_NAMES.get(data, data), "name": data, "split": "validation"}
        header["model-index"] = [
            {"name": title, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]  # fmt: skip
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _sentence(summary: Mapping[str, Any]) -> str:
    method, run = summary["config"]["mask"]["method"], summary["run"]
    unfinished = "" if run["step"] == run["steps"] else f", at step {run['step']:,} of {run['steps']:,}"
    return (
        f"Of its {summary['prunable']:,} prunable weights {summary['kept']:,} are left; the others are exactly 0. "
        f"Trained by ghostmask {__version__} with the mask method {method}, run {run['name']}{unfinished}."
    )


def _facts(summary: Mapping[str, Any]) -> str:
    def percent(key: str) -> str:
        return "not measured" if summary.get(key) is None else f"{summary[key]:.2%}"

    rows = {
        "top-1 accuracy": percent("accuracy"),
        "top-5 accuracy": percent("top5"),
        "density": f"{summary['density']:.4%}",
        "weights kept / prunable": f"{summary['kept']:,} / {summary['prunable']:,}",
        "parameters, all": f"{summary['network']['parameters']:,}",
        "FLOPs of an image, sparse / dense": f"{summary['flops_sparse']:,} / {summary['flops_dense']:,}",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _needs(*sources: str) -> str:
    """The packages that lines of Python import; torch too, whose tensors all of them are given."""
    names = re.findall(r"^(?:from|import) (\w+)", "\n".join(sources), re.MULTILINE)
    return ", ".join(dict.fromkeys(["torch", *(PACKAGES[name] for name in names if name in PACKAGES)]))


def _images(summary: Mapping[str, Any]) -> str:
    known = summary["preprocessing"]
    channels, height, width = summary["network"]["image_shape"]
    steps = []
    if known["resize"]:
        size, mode = known["resize"], known["interpolation"].upper()
        steps.append(f"v2.Resize({size}, v2.InterpolationMode.{mode}), v2.CenterCrop({known['size']})")
    steps.append("v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)")
    steps.append(f"v2.Normalize({known['mean']}, {known['std']})")
    code = "\n".join(f"    {step}," for step in steps)
    notes = [f"`net` takes float32 of shape (N, {channels}, {height}, {width}): RGB in [0, 1], normalised."]
    if known["exif"]:
        notes.append("Photographs are turned as their EXIF data say first.")
    if known["mirrored"]:
        notes.append("The accuracy is that of the mean of the logits of an image and its mirror image.")
    head = "import torch\nfrom torchvision.transforms import v2"
    return f"{' '.join(notes)} From a Pillow image:\n\n```python\n{head}\n\ntransform = v2.Compose([\n{code}\n])\n```"


def _classes(summary: Mapping[str, Any]) -> str:
    names, words = summary["preprocessing"]["classes"], summary["preprocessing"]["words"]
    count = summary["network"]["num_classes"]
    if not names:
        return f"{count} logits, in the order of the data set's labels, which have no names."
    lines = [f"{i}: {name}" + (f" ({words[name]})" if name in words else "") for i, name in enumerate(names)]
    text = "\n".join(f"- {line}" for line in lines)
    if count <= 20:
        return text
    return f"<details><summary>{count} classes</summary>\n\n{text}\n\n</details>"


def _layers(summary: Mapping[str, Any]) -> str:
    rows = [
        f"| {layer['name']} | {' x '.join(map(str, layer['shape']))} | {layer['kept']:,} | {layer['density']:.2%} |"
        for layer in summary["layers"]
    ]
    return "\n".join(["| weight | shape | kept | density |", "| --- | --- | --- | --- |", *rows])
