"""What does `ghostmask bench export RUN` measure: the network of a run in each format, and the dense one beside it?"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from ghostmask.benchmarks.export import DENSE, SAFETENSORS, Exports, Form
from ghostmask.engine.errors import InputError, to_stderr
from ghostmask.engine.world import World
from ghostmask.launcher.export import MODEL_FILE
from ghostmask.launcher.exporting import card, network_file
from ghostmask.launcher.exporting.convert import size_of, write_format
from ghostmask.launcher.exporting.exported import Exported, Options, Written
from ghostmask.launcher.exporting.registry import CODINGS, FORMATS


def write_forms(exported: Exported, folder: Path, world: World) -> Exports:
    """All formats in folders below `folder`, packed in fp16 with both codings; those that this network does not have,
    or whose library is missing, are named on stderr."""
    network = (exported.folder / network_file.FILE).is_file()
    plain = Form(exported.folder, card.plain_load(exported.summary, network), size_of(exported.folder / MODEL_FILE))
    forms = {DENSE: _dense(exported, plain, folder / DENSE), SAFETENSORS: plain}
    wanted = [(name, Options()) for name in FORMATS if name != "packed"]
    wanted += [("packed", Options("fp16", coding)) for coding in CODINGS]
    for name, options in wanted:
        key = f"packed, {options.values}, {options.coding}" if name == "packed" else name
        place = folder / key.replace(":", "_").replace(", ", "_")
        world.pulse.enter(f"{key} of {exported.folder}")
        try:
            forms[key] = _form(place, write_format(exported, place, name, options))
        except InputError as error:
            to_stderr(f"{key} is left out: {error}")
    if "onnx" in forms:
        world.pulse.enter(f"onnx of the dense network of {exported.folder}")
        written = write_format(_with_numbers(exported), folder / "dense_onnx", "onnx", Options())
        forms["dense_onnx"] = _form(folder / "dense_onnx", written)
    return Exports(forms, exported.image_shape)


def _form(folder: Path, written: Written) -> Form:
    return Form(folder, written.load, size_of(folder / written.files[0]))


def _with_numbers(exported: Exported) -> Exported:
    """The network with a small number in place of each 0."""
    net, generator = copy.deepcopy(exported.net), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            noise = torch.randn(weight.shape, generator=generator) * weight.std(correction=0).clamp(min=1e-3)
            weight.copy_(torch.where(weight == 0, noise, weight))
    return replace(exported, net=net)


def _dense(exported: Exported, plain: Form, folder: Path) -> Form:
    """As the plain export, of the dense network."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    state = _with_numbers(exported).net.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / MODEL_FILE)
    source = exported.folder / network_file.FILE
    if source.is_file():
        (folder / network_file.FILE).write_bytes(source.read_bytes())
    return Form(folder, plain.load, size_of(folder / MODEL_FILE))
