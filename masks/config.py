"""The settings of the mask: method, density, and what the methods need. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ghostmask.engine.config import require, require_number
from ghostmask.engine.errors import unknown_name
from ghostmask.engine.position import Duration
from ghostmask.masks.registry import METHODS


@dataclass(frozen=True)
class MaskConfig:
    """Which weights stay, how many, and how they are found. Fractions of training refer to train.epochs."""

    method: str = "probmask"
    """One of `ghostmask show methods`."""
    density: float = 0.1
    """Fraction of all prunable weights that is kept, in (0, 1]; 1 - sparsity."""
    path: str = ""
    """A trained network to start from: a run folder, or a .safetensors or .pt file with a state dict. file: the mask,
    in a mask file, the zeros of such a network, or a dict of tensors."""
    dense_layers: tuple[str, ...] = ()
    """Patterns (fnmatch) of weights never pruned, e.g. ["fc.weight"]; all convolutions and linear layers otherwise."""
    constraint: str = "global"
    """global (one budget for the network) or layerwise (the same density in every layer)."""
    lr: float = 6e-3
    """probmask: peak learning rate of Adam on the probabilities."""
    samples: int = 2
    """probmask: noise samples I per step that the loss is averaged over (eq. 3-5)."""
    noise: str = "per_rank"
    """probmask: per_rank (every rank draws its own noise) or shared (all ranks the same)."""
    gradient_bf16: bool = False
    """probmask: ranks send each other the gradients of the probabilities as bfloat16, half the bytes (ZeRO 1 and 2)."""
    start_fraction: float = 0.16
    """Where the density begins to fall (t1 of eq. 7), as a fraction of train.epochs."""
    end_fraction: float = 0.6
    """Where the density reaches its target (t2 of eq. 7), as a fraction of train.epochs."""
    temperature_end: float = 0.03
    """probmask: temperature at the end; tau = (1 - temperature_end)(1 - t/T) + temperature_end."""
    train_weights: bool = True
    """probmask: false = supermask, the weights stay at their initialisation and only probabilities are trained."""
    final: str = "topk"
    """probmask: how the final mask comes from s: topk (exactly round(density n) largest), sample, or best_of."""
    candidates: int = 10
    """probmask: masks that final=best_of samples and compares on training data."""
    update_every: int = 100
    """gmp: optimizer steps between updates of the mask."""
    allocation: str = "erk"
    """random: uniform (the same density in every layer), er or erk (by the layers' shapes; erk counts kernel sizes)."""
    min_per_layer: int = 0
    """With constraint=global, weights that every layer keeps at least; not for probmask, gmp and file."""
    score_batch: int = 128
    """snip, grasp, mlprune: images of all ranks that are scored at once (grasp, which needs more memory per image: a
    third of them). On ResNet-50 at 224 pixels, 128 take 9 GB (grasp) to 13 GB (mlprune)."""
    score_batches: int = 0
    """snip, mlprune: how many such batches are scored; 0 = 1 for snip (the paper's), 10 for mlprune."""
    samples_per_class: int = 0
    """grasp: images of each class that are scored; 0 = the paper's 10, but 1 with more than 100 classes."""
    iterations: int = 100
    """synflow: pruning steps from density 1 to mask.density."""
    damping: float = 1e-3
    """mlprune: share of a Kronecker factor's mean diagonal that is added to its diagonal before it is inverted."""
    round_fraction: float = 0.2
    """lth: share of the remaining weights that each round prunes."""
    rewind: str = "0ep"
    """lth: how far into the first round's training the weights are rewound, such as 500st or 2ep; 0ep = to init."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("mask.method", self.method, METHODS)
        require(self.method != "file" or self.path != "", "mask.path", self.path, "name the file for mask.method=file")
        require_number("mask.density", self.density, 0, 1, above=True)
        require_number("mask.lr", self.lr, 0, above=True)
        require_number("mask.samples", self.samples, 1)
        require_number("mask.candidates", self.candidates, 1)
        require_number("mask.update_every", self.update_every, 1)
        require_number("mask.min_per_layer", self.min_per_layer, 0)
        require_number("mask.score_batch", self.score_batch, 1)
        require_number("mask.score_batches", self.score_batches, 0)
        require_number("mask.samples_per_class", self.samples_per_class, 0)
        require_number("mask.iterations", self.iterations, 1)
        require_number("mask.damping", self.damping, 0, above=True)
        require_number("mask.round_fraction", self.round_fraction, 0, 0.99, above=True)
        Duration.parse(self.rewind, "mask.rewind")
        require(
            self.min_per_layer == 0 or self.constraint == "global" or self.method == "random",
            "mask.min_per_layer", self.min_per_layer, "is not read with mask.constraint=layerwise; leave it out",
        )  # fmt: skip
        require_number("mask.start_fraction", self.start_fraction, 0, 1)
        require_number("mask.end_fraction", self.end_fraction, 0, 1)
        require(
            self.start_fraction < self.end_fraction,
            "mask.start_fraction", self.start_fraction, f"give less than mask.end_fraction = {self.end_fraction:g}",
        )  # fmt: skip
        require_number("mask.temperature_end", self.temperature_end, 0, 1, above=True)
        for name, value, known in (
            ("mask.constraint", self.constraint, ("global", "layerwise")),
            ("mask.noise", self.noise, ("per_rank", "shared")),
            ("mask.allocation", self.allocation, ("uniform", "er", "erk")),
            ("mask.final", self.final, ("topk", "sample", "best_of")),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
