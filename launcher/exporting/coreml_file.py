"""Format coreml: the small network for Apple's devices, with its zeros in Core ML's sparse form."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ghostmask.launcher.exporting.exported import Exported, Options, Written, require_library
from ghostmask.launcher.exporting.small import deployed

FILE = "model.mlpackage"
THRESHOLD = 1e-12
"""Weights below it count as zeros; the default pass takes all below 1e-3, which are trained weights too."""
LOAD = f"""import coremltools

model = coremltools.models.MLModel("{FILE}")


def net(images):
    return model.predict({{"images": images.numpy()}})["logits"]"""


def write(exported: Exported, folder: Path, options: Options) -> Written:
    """model.mlpackage: input "images" of one image, output "logits". It runs on Apple's systems only."""
    tools = require_library("coreml", "coremltools", "coreml")
    optimize = require_library("coreml", "coremltools.optimize.coreml", "coreml")
    images = torch.zeros(1, *exported.image_shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(deployed(exported), images, check_trace=False)  # type: ignore[no-untyped-call]
        model = tools.convert(
            script, inputs=[tools.TensorType(name="images", shape=tuple(images.shape))],
            outputs=[tools.TensorType(name="logits")], convert_to="mlprogram",
            compute_precision=tools.precision.FLOAT32, minimum_deployment_target=tools.target.iOS16,
        )  # fmt: skip
        pruner = optimize.OpThresholdPrunerConfig(threshold=THRESHOLD, minimum_sparsity_percentile=0.3)
        model = optimize.prune_weights(model, optimize.OptimizationConfig(global_config=pruner))
    model.save(str(folder / FILE))
    note = (
        f"Core ML, for iOS 16 and macOS 13 on, one image at a time; zeros are stored as such (threshold {THRESHOLD})."
    )
    return Written([FILE], LOAD, [note])
