"""Format small: batch norm folded, dead channels gone; the same outputs from fewer weights, for any runtime."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import fx, nn

from ghostmask.engine.errors import InputError
from ghostmask.launcher.export import MODEL_FILE
from ghostmask.launcher.exporting import network_file
from ghostmask.launcher.exporting.exported import OTHERWISE, Exported, Options, Written
from ghostmask.launcher.exporting.folding import fold_batch_norms
from ghostmask.launcher.exporting.removal import remove_dead_channels
from ghostmask.launcher.exporting.tracing import compare, note_shapes, traced

PROGRAM, SCRIPT = "model.pt2", "model.torchscript"
LOAD = """from safetensors.torch import load_file
from network import Network

net = Network()
net.load_state_dict(load_file("model.safetensors"))
net.eval()"""

LOADS = {
    "torch.export": f'import torch\n\nnet = torch.export.load("{PROGRAM}").module()',
    "TorchScript": f'import torch\n\nnet = torch.jit.load("{SCRIPT}")',
}
"""The same network, with its weights, without network.py."""


@dataclass(frozen=True)
class Small:
    """graph: float32, in eval mode, whose outputs are those of the network it was made of. removed: (outputs before,
    after) of each layer that lost some; norms: batch norms that no layer could take."""

    graph: fx.GraphModule
    removed: dict[str, tuple[int, int]]
    norms: int


def shrink(net: nn.Module, image_shape: tuple[int, int, int]) -> Small:
    """The network without dead channels and, as far as possible, without batch norm; `net` stays as it is.

    All is computed in float64 and rounded once, and what comes out is compared with the network. Raises InputError for
    a network that torch.fx cannot trace, or that does something which was taken for something else.
    """
    try:
        return _shrunk(net, image_shape)
    except Exception as error:  # whatever a network's own forward makes of two images
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InputError(f"the network cannot be made small: {reason}; {OTHERWISE}") from error


def _shrunk(net: nn.Module, image_shape: tuple[int, int, int]) -> Small:
    graph = traced(net).cpu()
    note_shapes(graph, image_shape)
    graph.double()
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    norms = fold_batch_norms(graph)
    removed = remove_dead_channels(graph)
    graph.float().eval()
    compare(graph, copy.deepcopy(net).cpu(), image_shape, network_file.SAME)
    return Small(graph, removed, norms)


def deployed(exported: Exported) -> nn.Module:
    """What other runtimes get: the small network or, where that cannot be made, the network as it is."""
    try:
        return shrink(exported.net, exported.image_shape).graph
    except InputError:
        return exported.net


def write(exported: Exported, folder: Path, options: Options) -> Written:
    """model.safetensors and network.py, and the same as a torch.export program and as TorchScript."""
    small = shrink(exported.net, exported.image_shape)
    title = f"The network {exported.summary['network']['name']} without its dead channels, as ghostmask left it."
    classes = exported.summary["network"]["num_classes"]
    source = network_file.network_source(small.graph, title, exported.image_shape, classes)
    state = {name: tensor.contiguous() for name, tensor in small.graph.state_dict().items()}
    (folder / network_file.FILE).write_text(source, encoding="utf-8")
    (folder / MODEL_FILE).write_bytes(save(state))
    images = torch.zeros(2, *exported.image_shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is on its way out, and still what some runtimes take
        program = torch.export.export(small.graph, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        script: Any = torch.jit.trace(small.graph, images, check_trace=False)  # type: ignore[no-untyped-call]
    torch.export.save(program, content := io.BytesIO())
    (folder / PROGRAM).write_bytes(content.getvalue())  # torch's own writers say of a full disk that they failed
    (folder / SCRIPT).write_bytes(script.save_to_buffer())
    return Written([MODEL_FILE, network_file.FILE, PROGRAM, SCRIPT], LOAD, _notes(exported, small), LOADS)


def _notes(exported: Exported, small: Small) -> list[str]:
    gone = sum(before - after for before, after in small.removed.values())
    count = sum(p.numel() for p in small.graph.parameters())
    notes = [
        f"Batch norm is folded into the layers before it; {gone:,} dead channels in {len(small.removed)} layers are "
        f"taken out: {count:,} parameters of {exported.summary['network']['parameters']:,}.",
    ]
    if small.norms:
        notes.append(f"{small.norms} batch norms stand behind no layer that could take them.")
    return notes
