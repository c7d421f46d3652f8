"""In which formats can a network be exported? To add one, write its file here and add a line."""

from __future__ import annotations

PLAIN = "safetensors"
"""The plain state dict, which `ghostmask train` writes too (launcher.export); every other format is made of it."""

FORMATS = {
    "packed": "ghostmask.launcher.exporting.packed:write",
    "small": "ghostmask.launcher.exporting.small:write",
    "onnx": "ghostmask.launcher.exporting.onnx_file:write",
    "coreml": "ghostmask.launcher.exporting.coreml_file:write",
    "2:4": "ghostmask.launcher.exporting.two_four:write",
}
"""name -> "module:function", imported when it is used; function(Exported, folder, Options) -> Written."""

VALUES = ("float32", "bf16", "fp16")
CODINGS = ("plain", "entropy")
"""Of format packed: see launcher.exporting.packed."""
