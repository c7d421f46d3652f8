"""The settings that mask methods share; each method adds its own in its file. Imports no torch.

A method's `Settings` lists all that it reads: what is not in it is refused, with the methods that do read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from ghostmask.engine.config import LARGEST, path_field, require, require_number
from ghostmask.engine.errors import bad_value, unknown_name

LONGEST_SEARCHED = 100_000
"""Epochs or steps beyond which no length is proposed any more."""
UNITS = ("weight", "kernel", "channel")
"""Granularities besides N:M."""
LARGEST_BLOCK = 64
"""Of N:M."""


def number(default: float, low: float, high: float = LARGEST, *, above: bool = False) -> Any:
    """A field whose value must lie within these limits (see `require_number`)."""
    return field(default=default, metadata={"check": partial(require_number, low=low, high=high, above=above)})


def choice(*known: str) -> Any:
    """A field whose value must be one of the known names; the first is its default."""

    def check(name: str, value: str) -> None:
        if value not in known:
            raise unknown_name(name, value, known)

    return field(default=known[0], metadata={"check": check})


def shortest(works: Callable[[int], bool]) -> int | None:
    """The smallest length from 1 on with which a schedule works; None where there is none that anybody would train."""
    return next((length for length in range(1, LONGEST_SEARCHED) if works(length)), None)


@dataclass(frozen=True)
class MaskSettings:
    """Which weights stay, how many, and how they are found."""

    decided_by: ClassVar[str] = ""
    """Of a method whose density is a result, and no setting: the setting that decides it, more of it leaving less."""

    method: str = "probmask"
    """One of `ghostmask show methods`."""
    dense_layers: tuple[str, ...] = ()
    """Patterns (fnmatch) of weights never pruned, e.g. ["fc.weight"]."""
    only: tuple[str, ...] = ()
    """Patterns of the weights that may be pruned; empty = all convolutions, linear layers and attention projections."""

    def __post_init__(self) -> None:
        """Raises InputError for a value that its field does not allow; a subclass adds what concerns several fields."""
        for each in fields(self):
            if "check" in each.metadata:
                each.metadata["check"](f"mask.{each.name}", getattr(self, each.name))


@dataclass(frozen=True)
class WithDensity(MaskSettings):
    """A method that is told how many weights to keep."""

    density: float = number(0.1, 0, 1, above=True)
    """Fraction of all prunable weights that is kept, in (0, 1]; 1 - sparsity. Of their multiplications with
    mask.budget=flops."""


def granularity(refused: Mapping[str, str] | None = None) -> Any:
    """The field of mask.granularity: weight, kernel, channel, or N:M with 1 <= N < M <= 64, such as 2:4.

    refused: which of the first three the method does not take, with why and what to use instead.
    """

    def check(name: str, value: str) -> None:
        if n_of_m(value) is None and value not in UNITS:
            raise unknown_name(name, value, (*(u for u in UNITS if u not in (refused or {})), "2:4", "1:4"))
        if value in (refused or {}):
            raise bad_value(name, value, (refused or {})[value])

    return field(default="weight", metadata={"check": check})


def n_of_m(text: str) -> tuple[int, int] | None:
    """(N, M) of "N:M"; None for anything else."""
    first, colon, second = text.partition(":")
    if not (colon and first.isdecimal() and second.isdecimal() and 1 <= int(first) < int(second) <= LARGEST_BLOCK):
        return None
    return int(first), int(second)


@dataclass(frozen=True)
class InUnits(WithDensity):
    """A method that can prune several weights as one, or so many of each block."""

    granularity: str = granularity()
    """What is kept or removed as one: weight, kernel (of a convolution, between one input and one output channel),
    channel (an output channel with its batch norm, the next layers' inputs, and the channels that are added to it), or
    N:M such as 2:4 (of M neighbouring input channels the N largest stay, in every block; that decides the density)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if block := n_of_m(self.granularity):
            self._check_block(block[0] / block[1])

    def _check_block(self, density: float) -> None:
        """Blocks say how much stays, and where: take their density, and refuse what else would."""
        chosen = f"is not read with mask.granularity={self.granularity}"
        known = {f.name: f.default for f in fields(self)}
        for name in ("constraint", "budget", "allocation", "min_per_layer"):
            value = getattr(self, name, known.get(name))
            require(
                value == known.get(name), f"mask.{name}", value, f"{chosen}, which holds in every block; leave it out"
            )
        require(
            self.density in (known["density"], density),
            "mask.density", self.density, f"{chosen}, which keeps {density:g} of a block; leave it out or give that",
        )  # fmt: skip
        object.__setattr__(self, "density", density)


@dataclass(frozen=True)
class Ranked(InUnits):
    """A method that keeps the largest of something."""

    constraint: str = choice("global", "layerwise")
    """global (one budget for the network) or layerwise (the same density in every layer)."""
    budget: str = choice("weights", "flops")
    """What mask.density is a fraction of: the weights, or the multiplications (a weight counts as often as an image
    uses it)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget == "flops" and self.constraint == "layerwise" and self.granularity != "channel":
            raise bad_value("mask.budget", "flops", "inside a layer every weight counts alike: use constraint=global")


@dataclass(frozen=True)
class Protecting(Ranked):
    """A ranking method that can save layers from losing all their weights."""

    min_per_layer: int = number(0, 0)
    """With constraint=global, weights (or kernels, or channels: mask.granularity) that every layer keeps at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.min_per_layer == 0 or self.constraint == "global",
            "mask.min_per_layer", self.min_per_layer, "is not read with mask.constraint=layerwise; leave it out",
        )  # fmt: skip


def layer_saver(value: Callable[[str, Any], Any]) -> str:
    """The setting with which no layer loses everything, in words.

    value: of a setting of the method by its name, or what is given second where the method does not have it.
    """
    if value("min_per_layer", None) is not None and value("constraint", "global") == "global":
        return "mask.min_per_layer=1 keeps some"
    if value("constraint", "") == "global":
        return "mask.constraint=layerwise keeps some of each"
    return "mask.dense_layers leaves them as they are"


@dataclass(frozen=True)
class Noisy(MaskSettings):
    """A method whose weights are noisy while it searches."""

    samples: int = number(1, 1, 10_000)
    """Noise samples that every part of the batch is computed with, over which the loss is averaged."""
    noises: int = number(1, 1, 65_536)
    """Noise groups S: the parts of the batch share S samples of the noise per step. 1 = the state is sharded over all
    ranks; S = ranks: every rank its own noise, the state replicated."""


@dataclass(frozen=True)
class WithPower(MaskSettings):
    """A method that ranks weights by their magnitude."""

    power: float = number(1.0, 1, 8)
    """Powerpropagation (Schwarz et al. 2021): what is trained is v with theta = v |v|^(power - 1); 1 = off, the
    paper's best are 2 to 4. The network starts the same; weight decay acts on v."""


@dataclass(frozen=True)
class FromTrained(MaskSettings):
    """A method that can start from a trained network."""

    path: str = path_field("")
    """A trained network to start from: a run folder, or a .safetensors or .pt file with a state dict."""


@dataclass(frozen=True)
class ScoringImages(MaskSettings):
    """A finder that looks at images."""

    score_batch: int = number(128, 1)
    """Images of all ranks that are scored at once (grasp, which needs more memory per image: a third of them). On
    ResNet-50 at 224 pixels, 128 take 9 GB (grasp) to 13 GB (mlprune)."""


@dataclass(frozen=True)
class Scheduled(WithDensity):
    """A method whose density falls while it trains. Fractions refer to train.epochs."""

    start_fraction: float = number(0.16, 0, 1)
    """Where the density begins to fall (t1 of ProbMask's eq. 7), as a fraction of train.epochs."""
    end_fraction: float = number(0.6, 0, 1)
    """Where the density reaches its target (t2 of ProbMask's eq. 7), as a fraction of train.epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.start_fraction < self.end_fraction,
            "mask.start_fraction", self.start_fraction, f"give less than mask.end_fraction = {self.end_fraction:g}",
        )  # fmt: skip

    def window(self, whole: Callable[[float], int], length: int) -> tuple[int, int]:
        """Where the density begins to fall and where it is reached, in `length` epochs or steps, made `whole`."""
        return whole(self.start_fraction * length), whole(self.end_fraction * length)

    def falls(self, length: int) -> bool:
        """Whether the density is reached later in `length` steps than it begins to fall."""
        first, last = self.window(round, length)
        return first < last

    def require_fall(self, name: str, length: int, falls: Callable[[int], bool], unit: int = 1) -> None:
        """Raise the InputError of `name` = `length` where the density is not reached in it, unless nothing is pruned.

        falls: whether it is, in a number of `unit`s.
        """
        if self.density == 1 or falls(length // unit):
            return
        enough = shortest(falls)
        window = f"mask.start_fraction = {self.start_fraction:g} to mask.end_fraction = {self.end_fraction:g}"
        fix = (
            f"give at least {unit * enough}" if enough else "give fractions that lie further apart, and an end below 1"
        )
        why = f"the density has no time to fall to {self.density:g} from {window}"
        raise bad_value(name, length, f"{why}; {fix}")
