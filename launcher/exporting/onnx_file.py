"""Format onnx: the small network for ONNX Runtime and whatever else reads ONNX."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from ghostmask.engine.atomic import replacing
from ghostmask.launcher.exporting.exported import Exported, Options, Written, require_library
from ghostmask.launcher.exporting.small import deployed

FILE = "model.onnx"
OPSET = 18
LOAD = f"""import onnxruntime

session = onnxruntime.InferenceSession("{FILE}", providers=["CPUExecutionProvider"])


def net(images):
    return session.run(None, {{"images": images.numpy()}})[0]"""


def write(exported: Exported, folder: Path, options: Options) -> Written:
    """model.onnx: input "images" of any batch size, output "logits"; weights inside."""
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
    with replacing(folder / FILE) as writing:
        program.save(str(writing), external_data=False)
    return Written([FILE], LOAD, [f"ONNX opset {OPSET}, made of the network of format small, weights in float32."])
