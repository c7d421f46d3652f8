"""Format onnx: the small network for ONNX Runtime and whatever else reads ONNX."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ghostmask.engine.errors import InputError
from ghostmask.launcher.exporting import network_file
from ghostmask.launcher.exporting.exported import OTHERWISE, Exported, Options, Written, require_library
from ghostmask.launcher.exporting.small import deployed
from ghostmask.launcher.exporting.tracing import compare

FILE = "model.onnx"
OPSET = 18
LOAD = f"""import onnxruntime

session = onnxruntime.InferenceSession("{FILE}", providers=["CPUExecutionProvider"])


def net(images):
    return session.run(None, {{"images": images.numpy()}})[0]"""


def write(exported: Exported, folder: Path, options: Options) -> Written:
    """model.onnx: input "images" of any batch size, output "logits"; weights inside. Raises InputError where
    ONNX Runtime is there and computes something else of it than the network."""
    require_library("onnx", "onnx")
    require_library("onnx", "onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    images = torch.zeros(2, *exported.image_shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            deployed(exported), (images,), dynamo=True, verbose=False, opset_version=OPSET, input_names=["images"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    program.save(str(folder / FILE), external_data=False)
    if importlib.util.find_spec("onnxruntime"):
        try:
            compare(_Read(folder / FILE), copy.deepcopy(exported.net), exported.image_shape, network_file.SAME)
        except InputError as error:
            raise InputError(f"--format = 'onnx': cannot be made of this network: {error}; {OTHERWISE}") from None
    return Written([FILE], LOAD, [f"ONNX opset {OPSET}, made of the network of format small, weights in float32."])


class _Read(nn.Module):
    """The file, as ONNX Runtime computes it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        """(N, classes) logits."""
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])
