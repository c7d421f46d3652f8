"""What a mask method is: the phases it trains in, what each phase trains, and the masks that come out.

phases()                 ("search", "finetune"), ("train",), ...
prepare()                a new run only: load what the method starts from
for each phase:
    begin(phase, ...)    only when the phase starts at its first step, on the plain network: find a mask, ...
    enter(phase)         -> Setup: how the weights are made from their state, hooks   (new and resumed runs: builds,
                            decides nothing that a checkpoint does not overwrite)
    [the engine trains the phase]
    leave(trainer)       the phase's result, e.g. the mask that the probabilities give
    [the network's parameters are plain again, pruned weights 0]
found                    name -> bool tensor, the result
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ghostmask.engine.batchnorm import reestimate
from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.layerwise import sgd_of
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Plain, Reparametrization
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import World, single
from ghostmask.masks.checking import MaskWatch
from ghostmask.masks.granularity import Uses, units_of
from ghostmask.masks.masked import PRUNABLE, Masked, present_masks
from ghostmask.masks.power import powered
from ghostmask.masks.prunable import prunable_weights
from ghostmask.masks.report import DensityReport, mask_lines
from ghostmask.masks.scoring.topk import Budget
from ghostmask.masks.settings import MaskSettings
from ghostmask.masks.units.channels import Channels

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer

FINETUNE = "finetune"
OTHER = "other"
"""The parameter group of everything that is never pruned: biases, batch norm, dense layers."""
BATCH_NORM_BATCHES = 100
"""Training batches from which batch norm is re-estimated for a new mask (fewer if the epoch has fewer)."""


@dataclass(frozen=True)
class Setup:
    """What a phase trains: module (images -> logits), parameter groups, hooks, noise samples per part."""

    model: nn.Module
    groups: list[ParameterGroup]
    hooks: Sequence[Hook] = ()
    passes: int = 1


@dataclass(frozen=True)
class Recipe:
    """How weights are trained: the main phase's optimizer, fine-tuning, the main phase's epochs, the run's seed; bf16:
    whether the network computes with bfloat16 weights; image_shape: (channels, height, width) of what it sees; uses: by
    weight name, how often one image uses each weight."""

    optim: OptimConfig
    finetune: FinetuneConfig
    epochs: int
    seed: int
    bf16: bool = False
    image_shape: tuple[int, int, int] | None = None
    uses: Uses = dict


class MaskMethod(ABC):
    """Chooses which weights of `net` stay. One subclass per method, listed in masks.registry.

    net is mask-free: its state dict has plain names at every moment, and between phases plain float32 parameters.
    """

    Settings: ClassVar[type[MaskSettings]] = MaskSettings
    """All settings of `mask` that the method reads."""
    searches: ClassVar[bool] = False
    """Whether it finds its mask while the main phase trains."""
    finetunes: ClassVar[bool] = False
    """Whether a fine-tuning phase follows after the mask is found."""
    every_phase_has_a_result: ClassVar[bool] = False
    """Whether each phase, and not the last one only, trains a network that can be exported under its present masks."""
    blind_at_zero: ClassVar[bool] = False
    """Whether its scores are 0 for weights behind which nothing depends on them, as a batch norm of weight 0 has it."""
    prunes_trained: ClassVar[bool] = False
    """Whether it is meant for a trained network, which is given as mask.path."""
    paper: ClassVar[str] = ""
    """Who published it, when, under which title, and where it can be read: for `ghostmask show methods NAME`."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names that people look for, each with the setting, after a space, that makes it that: "imp", "supermask
    mask.train_weights=false"."""

    def __init__(self, settings: Any, net: nn.Module, recipe: Recipe, world: World) -> None:
        self.settings, self.net, self.recipe, self.world = settings, net, recipe, world
        self.weights: dict[str, nn.Parameter] = prunable_weights(net, settings.dense_layers, settings.only)
        self.units = units_of(settings, net, self.weights, recipe.image_shape, recipe.uses)
        """What the method prunes as one: see `budget`."""
        self.found: dict[str, Tensor] = {}
        """The result: weight name -> bool tensor of its shape, equal on every rank; empty for a dense network."""
        self.watch = MaskWatch(settings, world)
        self._said: list[str] = []

    @classmethod  # noqa: B027
    def check(cls, settings: Any, run: Any) -> None:
        """Raise InputError where the method's settings do not fit the rest of a run (launcher.config.RunConfig)."""

    @classmethod
    def ends_under_one_mask(cls, settings: Any, run: Any) -> bool:
        """Whether the run's last phase trains under a mask that stays; else its weights cannot be averaged (ema)."""
        return True

    @classmethod  # noqa: B027
    def check_steps(cls, settings: Any, run: Any, steps_per_epoch: int) -> None:
        """As check, of what only the number of images decides: raise InputError where a schedule rounds to nothing."""

    def phases(self) -> tuple[tuple[str, int], ...]:
        """The phases in order, with their epochs; 0 epochs = only begin() and leave()."""
        return (("train", self.recipe.epochs),)

    @abstractmethod
    def reparametrization(self, phase: Phase) -> Reparametrization:
        """How `phase` makes the prunable weights from their state."""

    def hooks(self, phase: Phase, form: Reparametrization) -> Sequence[Hook]:
        """What reports on the method, or acts for it, while `phase` trains; after the checks of its mask."""
        return ()

    def enter(self, phase: Phase) -> Setup:
        """What `phase` trains: the prunable weights through their reparametrization, everything else as it is."""
        form = powered(self.reparametrization(phase), getattr(self.settings, "power", 1.0))
        lr = self.recipe.finetune.lr if phase.name == FINETUNE else self.recipe.optim.lr
        last = self.counts() if phase.name == self.phases()[-1][0] else None
        checks = (DensityReport(self.watch, last),) if isinstance(form, Masked) else ()
        return Setup(self.net, self.groups(form, lr), (*checks, *self.hooks(phase, form)))

    def counts(self) -> Sequence[int] | None:
        """How many weights the delivered mask keeps: (one number) in all, or of each layer; None: any number.

        By the settings, where a density is among them.
        """
        density = getattr(self.settings, "density", None)
        if density is None:
            return None
        return self.budget().counts([w.numel() for w in self.weights.values()])

    def groups(self, form: Reparametrization, lr: float) -> list[ParameterGroup]:
        """Every parameter of the network: the prunable weights made by `form`, the others under SGD."""
        names = {id(w) for w in self.weights.values()}
        others = {n: p for n, p in self.net.named_parameters() if id(p) not in names}
        groups = [ParameterGroup(PRUNABLE, self.weights, form, lr, self.recipe.bf16)]
        if others:
            groups.append(ParameterGroup(OTHER, others, Plain({"weight": self.rule()}), lr))
        return groups

    def rule(self) -> Sgd:
        """How dense weights move."""
        return sgd_of(self.recipe.optim)

    def budget(self, density: float | None = None) -> Budget:
        """What the settings of a ranking method allow, at mask.density unless another density is asked for."""
        s = self.settings
        constraint, least = getattr(s, "constraint", "global"), getattr(s, "min_per_layer", 0)
        return Budget(density or s.density, constraint, least, self.recipe.seed, self.units)

    def prepare(self) -> None:  # noqa: B027  (a method that starts from the initialisation needs nothing)
        """A new run: bring `net` to the state the method starts from."""

    def begin(self, phase: Phase, data: DataPipeline, say: Callable[[str], None]) -> None:
        """Collective: before the first step of a phase, on the plain network. say: prints on rank 0.

        Re-estimates batch norm where a mask was just applied.
        """
        if phase.name == FINETUNE:
            with torch.no_grad():
                for name, mask in self.found.items():
                    self.weights[name].masked_fill_(~mask, 0.0)
            with closing(data.train(phase.first_epoch)) as batches:
                some = islice(batches, BATCH_NORM_BATCHES)
                reestimate(self.net, some, data.parts, self.world)

    def leave(self, trainer: Trainer) -> None:
        """Collective: after the last step of a phase."""
        optimizer = trainer.sharded.optimizer
        masks = present_masks(optimizer)
        if masks:
            group, _, part = optimizer.group(PRUNABLE)
            assert isinstance(group.reparametrization, Masked)
            self.settle(masks, trainer.reporter.progress.message, group.reparametrization.due(part))
        self.found = masks

    def silence(self) -> None:
        """What removed channels leave in the plain network under its masks, batch norms and biases, becomes 0."""
        if isinstance(self.units, Channels) and self.found:
            self.units.silence(self.net, self.found)

    def settle(self, masks: dict[str, Tensor], say: Callable[[str], None], due: Sequence[int] | None = None) -> None:
        """Collective: from now on these are the masks; say what they are, unless it was said before.

        due: what they must keep (see `counts`); None: any number. Raises RuntimeError unless they keep that, and every
        rank has the same.
        """
        whole = Slice.even(masks, single(next(iter(masks.values())).device))
        self.watch.check(whole, whole.cut(masks), due, say)
        self.found = masks
        lines = mask_lines(masks, getattr(self.settings, "granularity", "weight"))
        for line in lines if lines != self._said else ():
            say(line)
        self._said = lines
