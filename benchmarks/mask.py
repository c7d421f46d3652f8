"""How fast is the mask operator, forward and backward over a whole network, and how much memory does it take?"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostmask.benchmarks import textbook
from ghostmask.benchmarks.row import Row, faster, share
from ghostmask.benchmarks.timing import Bench, Work, copy_bandwidth, device_seconds, interleaved, peak_extra_bytes
from ghostmask.masks.kernels.noise import NoiseKey
from ghostmask.masks.kernels.relaxed_mask import relaxed_weights
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

TEMPERATURE = 0.5
MOVED_BYTES = 4 * (3 + 5)
"""Per weight: forward reads w and s and writes w m; backward reads dL/d(w m), w and s and writes both gradients."""


def rows(bench: Bench) -> list[Row]:
    """Cases mask_operator, mask_operator_memory, mask_operator_floor; on CUDA also _device and _compiled."""
    weights, probabilities, grads = network_tensors(bench)
    inputs = [*weights, *probabilities]
    numel = sum(w.numel() for w in weights)
    key = NoiseKey(0, 0, 0, 0)

    def operator() -> object:
        return torch.autograd.grad(relaxed_weights(weights, probabilities, key, TEMPERATURE), inputs, grads)

    def eager() -> object:
        return torch.autograd.grad(textbook.masked_weights(weights, probabilities, TEMPERATURE), inputs, grads)

    cuda = bench.device.type == "cuda"
    repeats = 3 if bench.quick else 50 if cuda else 9
    both: dict[str, Work] = {"operator": operator, "eager": eager}
    seconds = interleaved(both, repeats, bench.device, warm_up=3 if cuda else 1, settle=not cuda)
    on_device = device_seconds(both, repeats) if cuda else seconds
    results = 2 * 4 * numel
    peaks = {"operator": peak_extra_bytes(operator, bench.device), "eager": peak_extra_bytes(eager, bench.device)}
    extra = {name: max(peak - results, 4096) / 1e6 for name, peak in peaks.items()}
    floor = MOVED_BYTES * numel / copy_bandwidth(bench.device, bench.quick)
    what = f"forward + backward, {len(weights)} tensors, {numel:,} weights"
    ms = {name: 1000 * value for name, value in seconds.items()}
    found = [
        faster("mask_operator", ms["operator"], ms["eager"], "ms", f"{what}; baseline: textbook eager; bar: 10x"),
        share(
            "mask_operator_memory", extra["operator"], extra["eager"], "MB",
            f"beyond inputs and both gradients ({results / 1e6:.0f} MB); baseline: textbook eager; bar: 0.4",
        ),
        share(
            "mask_operator_floor", 1000 * on_device["operator"], 1000 * floor, "ms",
            f"baseline: {MOVED_BYTES} bytes per weight at the bandwidth of a copy; bar on a GPU: 2",
        ),
    ]  # fmt: skip
    if not cuda:
        return found
    note = "the device's time, launches queued beforehand as in a step; baseline: textbook eager; bar: 10x"
    device = faster("mask_operator_device", 1000 * on_device["operator"], 1000 * on_device["eager"], "ms", note)
    return [*found, device, *_compiled(bench, operator, inputs, grads, len(weights))]


def network_tensors(bench: Bench) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, probabilities in [0, 1], incoming gradients) of ResNet-50's prunable tensors (quick: ResNet-20's)."""
    name, shape = ("resnet20", (3, 32, 32)) if bench.quick else ("resnet50", (3, 224, 224))
    net = build_model(ModelConfig(name=name), 1000, shape, 0).to(bench.device)
    weights = [w.detach().requires_grad_() for w in prunable_weights(net).values()]
    generator = torch.Generator(bench.device).manual_seed(1)
    probabilities = [torch.rand(w.shape, generator=generator, device=bench.device).requires_grad_() for w in weights]
    grads = [torch.randn(w.shape, generator=generator, device=bench.device) for w in weights]
    return weights, probabilities, grads


def _compiled(bench: Bench, operator: object, inputs: list[Tensor], grads: list[Tensor], count: int) -> list[Row]:
    """torch.compile of the textbook, tensor by tensor: what a user gets without any operator of ours."""
    compiled = torch.compile(textbook.masked_weights, dynamic=True)

    def work() -> object:
        pairs = zip(inputs[:count], inputs[count:], strict=True)
        masked = [compiled([w], [s], TEMPERATURE)[0] for w, s in pairs]
        return torch.autograd.grad(masked, inputs, grads)

    assert callable(operator)
    seconds = interleaved({"operator": operator, "compiled": work}, 3 if bench.quick else 50, bench.device, warm_up=3)
    note = "baseline: torch.compile of the textbook"
    return [faster("mask_operator_compiled", 1000 * seconds["operator"], 1000 * seconds["compiled"], "ms", note)]
