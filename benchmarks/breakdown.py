"""How is a trace of torch.profiler added up into the parts of a step?"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._autograd import DeviceType

CATEGORIES = (
    "data wait", "forward", "backward", "chain rule", "optimizer", "constraint", "parameters", "communication",
)  # fmt: skip
_TAKEN_OUT = ("communication",)
"""Parts that run inside others and are counted for themselves."""


def seconds_by_category(trace: Any, device: torch.device) -> dict[str, float]:
    """Category -> seconds in a finished torch.profiler.profile; "rest": what a "step" holds beside them.

    CPU: wall time of the ranges. CUDA: time of the kernels that were launched inside them; "rest" is then the other
    kernels, not the time in which none ran.
    """
    found = dict.fromkeys((*CATEGORIES, "rest"), 0.0)
    for event in trace.events():
        if event.device_type != DeviceType.CPU:
            continue  # kernels, which their ranges count, and the ranges once more as the GPU saw them
        name = _category(event.name)
        if name is None:
            continue
        inside = _enclosing(event)
        seconds = (event.device_time_total if device.type == "cuda" else event.cpu_time_total) / 1e6
        if name == "rest":
            found["rest"] += seconds
        elif inside in (None, "rest") or (name in _TAKEN_OUT and inside in ("forward", "backward")):
            found[name] += seconds
            if inside is not None:
                found[inside] -= seconds
    return {name: max(seconds, 0.0) for name, seconds in found.items()}


def _enclosing(event: Any) -> str | None:
    """The category of the nearest range around an event, "rest" for the step's own.

    None where there is no range: on a GPU backward runs in a thread of autograd's, outside the step's range.
    """
    parent = event.cpu_parent
    while parent is not None:
        name = _category(parent.name)
        if name is not None:
            return name
        parent = parent.cpu_parent
    return None


def _category(name: str) -> str | None:
    if name in CATEGORIES:
        return name
    if name == "step":
        return "rest"
    if name.startswith("autograd::engine::evaluate_function"):
        return "backward"
    if name.startswith(("c10d::", "nccl:", "gloo:")):
        return "communication"
    return None
