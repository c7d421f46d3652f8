"""How fast is the relaxed mask, both passes over a network's weights, and how much memory does it take?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ghostmask.benchmarks import textbook
from ghostmask.benchmarks.row import Row, faster, share
from ghostmask.benchmarks.timing import Bench, Work, copy_bandwidth, device_seconds, interleaved, peak_extra_bytes
from ghostmask.masks.kernels.noise import noise_key
from ghostmask.masks.kernels.relaxed_mask import gradients_, masked_
from ghostmask.masks.prunable import prunable_weights
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

TEMPERATURE = 0.5
MOVED_BYTES = 4 * (3 + 5)
"""Per weight: w and s are read and w m is written; dL/d(w m), w and s are read and both gradients are written, dL/dw in
the place of dL/d(w m)."""
RESULT_BYTES = 4 * 3
RANKS = 8
BASELINE = "textbook eager, tensor by tensor"


@dataclass(frozen=True)
class Vectors:
    """Flat float32 vectors of a network's prunable weights, and the sizes of the tensors that they lie in there."""

    sizes: list[int]
    weight: Tensor
    probability: Tensor
    gradient: Tensor

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """(weights, probabilities, gradients) tensor by tensor; the first two are leaves for autograd."""
        weights, probabilities, gradients = (
            [part.clone() for part in torch.split(vector, self.sizes)]
            for vector in (self.weight, self.probability, self.gradient)
        )
        return [w.requires_grad_() for w in weights], [s.requires_grad_() for s in probabilities], gradients


def rows(bench: Bench) -> list[Row]:
    """Cases mask_operator, mask_operator_memory, mask_operator_floor, _slice; on CUDA also _device and _compiled."""
    cuda, vectors = bench.device.type == "cuda", network_vectors(bench)
    numel = sum(vectors.sizes)
    weights, probabilities, grads = vectors.tensors()
    inputs = [*weights, *probabilities]
    both: dict[str, Work] = {
        "operator": _operator(vectors, 0, numel),
        "slice": _operator(vectors, numel * 3 // RANKS, numel * 4 // RANKS),
        "eager": lambda: torch.autograd.grad(
            textbook.masked_weights(weights, probabilities, TEMPERATURE), inputs, grads
        ),
    }
    repeats, given = 3 if bench.quick else 50 if cuda else 9, vectors.gradient.clone()
    # The operator overwrites the gradient: again and again it would end in numbers that a processor is slow with.
    fresh: dict[str, Work] = dict.fromkeys(("operator", "slice"), lambda: vectors.gradient.copy_(given))
    seconds = interleaved(both, repeats, bench.device, fresh, warm_up=3 if cuda else 1, settle=not cuda)
    on_device = device_seconds(both, repeats) if cuda else seconds
    ms = {name: 1000 * value for name, value in seconds.items()}
    device_ms = {name: 1000 * value for name, value in on_device.items()}
    extra = {name: peak_extra_bytes(both[name], bench.device) / 1e6 for name in ("operator", "eager")}
    results = RESULT_BYTES * numel / 1e6
    floor = 1000 * MOVED_BYTES * numel / copy_bandwidth(bench.device, bench.quick)
    what = f"one flat slice of {numel:,} weights, both passes; baseline: {BASELINE}, {len(weights)} tensors"
    found = [
        faster("mask_operator", ms["operator"], ms["eager"], "ms", what, bar=10),
        share(
            "mask_operator_memory", max(extra["operator"], 0.004), max(extra["eager"] - results, 0.004), "MB",
            f"beyond inputs, w m and both gradients ({results:.0f} MB); baseline: {BASELINE}", bar=0.4,
        ),
        share(
            "mask_operator_floor", device_ms["operator"], floor, "ms",
            f"baseline: {MOVED_BYTES} bytes per weight at the bandwidth of a copy", bar=2 if cuda else None,
        ),
        share(
            "mask_operator_slice", device_ms["slice"], device_ms["operator"], "ms",
            f"one rank's slice of {RANKS}; baseline: the whole network; 1/{RANKS} = {1 / RANKS}",
        ),
    ]  # fmt: skip
    if not cuda:
        return found
    note = f"the device's time, launches queued beforehand as in a step; baseline: {BASELINE}"
    device = faster("mask_operator_device", device_ms["operator"], device_ms["eager"], "ms", note, bar=10)
    return [*found, device, *_compiled(bench, both["operator"], weights, probabilities, grads)]


def network_vectors(bench: Bench) -> Vectors:
    """Of ResNet-50 (quick: ResNet-20); probabilities in [0, 1]."""
    name, shape = ("resnet20", (3, 32, 32)) if bench.quick else ("resnet50", (3, 224, 224))
    weights = [w.detach() for w in prunable_weights(build_model(ModelConfig(name=name), 1000, shape, 0)).values()]
    weight = torch.cat([w.flatten() for w in weights]).to(bench.device)
    generator = torch.Generator(bench.device).manual_seed(1)
    probability = torch.rand(weight.shape, generator=generator, device=bench.device)
    gradient = torch.randn(weight.shape, generator=generator, device=bench.device)
    return Vectors([w.numel() for w in weights], weight, probability, gradient)


def _operator(vectors: Vectors, first: int, end: int) -> Work:
    """Both passes over a slice of the network; what they write is allocated here, as an optimizer does once."""
    w, s, g = (vector[first:end] for vector in (vectors.weight, vectors.probability, vectors.gradient))
    out, slope, key = torch.zeros_like(w), torch.zeros_like(w), noise_key(0, 0, 0)

    def work() -> None:
        masked_(out, w, s, first, key, TEMPERATURE)
        gradients_(g, w, s, first, key, TEMPERATURE, slope)

    return work


def _compiled(
    bench: Bench, operator: Work, weights: list[Tensor], probabilities: list[Tensor], grads: list[Tensor]
) -> list[Row]:
    """torch.compile of the textbook, tensor by tensor: what a user gets without any operator of ours."""
    compiled = torch.compile(textbook.masked_weights, dynamic=True)

    def work() -> object:
        masked = [compiled([w], [s], TEMPERATURE)[0] for w, s in zip(weights, probabilities, strict=True)]
        return torch.autograd.grad(masked, [*weights, *probabilities], grads)

    seconds = interleaved({"operator": operator, "compiled": work}, 3 if bench.quick else 50, bench.device, warm_up=3)
    note = "baseline: torch.compile of the textbook"
    return [faster("mask_operator_compiled", 1000 * seconds["operator"], 1000 * seconds["compiled"], "ms", note)]
