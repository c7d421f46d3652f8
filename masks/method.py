"""What a mask method is: the phases it trains in, what each phase trains, and the masks that come out.

phases()                 ("search", "finetune"), ("train",), ...
prepare()                a new run only: load what the method starts from
for each phase:
    enter(phase)         -> Setup: module, parameter groups, hooks     (new and resumed runs: builds, decides nothing
                            that a checkpoint does not overwrite)
    begin(trainer)       only when the phase starts at its first step
    [the engine trains the phase]
    leave(trainer)       the phase's result, e.g. the mask that the probabilities give
masks()                  name -> bool tensor, the result
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from ghostmask.engine.batchnorm import reestimate
from ghostmask.engine.config import FinetuneConfig, OptimConfig
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.optimizer import ParameterGroup, Sgd
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World
from ghostmask.masks.config import MaskConfig
from ghostmask.masks.prunable import prunable_weights

FINETUNE = "finetune"
BATCH_NORM_BATCHES = 100
"""Training batches per rank from which batch norm is re-estimated for a new mask (fewer if the epoch has fewer)."""


@dataclass(frozen=True)
class Setup:
    """What a phase trains: module (images -> logits), parameter groups, hooks, forward passes per microbatch."""

    model: nn.Module
    groups: list[ParameterGroup]
    hooks: Sequence[Hook] = ()
    passes: int = 1


@dataclass(frozen=True)
class Recipe:
    """How weights are trained: the main phase's optimizer, fine-tuning, the main phase's epochs, the run's seed."""

    optim: OptimConfig
    finetune: FinetuneConfig
    epochs: int
    seed: int


class MaskMethod(ABC):
    """Chooses which weights of `net` stay. One subclass per method, listed in masks.registry.

    net is mask-free and stays so: its state dict has plain names at every moment.
    """

    every_phase_has_a_result = False
    """Whether each phase, and not the last one only, trains a network that can be exported under its present masks."""

    protects = False
    """Whether it reads mask.min_per_layer, which saves a layer from losing all its weights."""

    def __init__(self, config: MaskConfig, net: nn.Module, recipe: Recipe, world: World) -> None:
        self.config, self.net, self.recipe, self.world = config, net, recipe, world
        self.weights: dict[str, nn.Parameter] = prunable_weights(net, config.dense_layers)

    @property
    def num_prunable(self) -> int:
        """n: the number of weights that may be pruned, over the whole network."""
        return sum(w.numel() for w in self.weights.values())

    @abstractmethod
    def phases(self) -> tuple[tuple[str, int], ...]:
        """The phases in order, with their epochs; 0 epochs = only begin() and leave()."""

    @abstractmethod
    def enter(self, phase: Phase) -> Setup:
        """What `phase` trains."""

    @abstractmethod
    def masks(self) -> Mapping[str, Tensor]:
        """Weight name -> bool tensor of its shape, equal on every rank; empty for a dense network."""

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        """Collective: the masks of a method that needs no training to find them (launcher.checks.FINDERS), equal on
        every rank; the network, as `prepare` left it, stays exactly as it is."""
        raise NotImplementedError(f"{type(self).__name__} finds its mask by training")

    def prepare(self) -> None:  # noqa: B027  (a method that starts from the initialisation needs nothing)
        """A new run: bring `net` to the state the method starts from."""

    def begin(self, trainer: Trainer) -> None:
        """Collective: before the first step of a phase. Re-estimates batch norm where a mask was just applied."""
        if trainer.phase.name == FINETUNE:
            batches = trainer.data.train(trainer.phase.first_epoch)
            reestimate(trainer.model, islice(batches, BATCH_NORM_BATCHES), self.world)

    def leave(self, trainer: Trainer) -> None:  # noqa: B027
        """Collective: after the last step of a phase."""

    def weight_group(self, phase: Phase) -> ParameterGroup:
        """Every parameter of the network, under SGD with the phase's learning rate."""
        optim = self.recipe.optim
        lr = self.recipe.finetune.lr if phase.name == FINETUNE else optim.lr
        rule = Sgd(optim.momentum, optim.weight_decay, optim.nesterov)
        return ParameterGroup("weight", dict(self.net.named_parameters()), rule, lr)


def check_agreement(masks: Mapping[str, Tensor], world: World) -> None:
    """Collective: raises RuntimeError unless every rank holds the same masks (compared by position-weighted sums)."""
    sums = torch.stack([_fingerprint(m) for m in masks.values()]).to(world.device)
    every = world.all_gather(sums)
    if not bool((every == every[0]).all()):
        wrong = [n for n, column in zip(masks, every.T, strict=True) if len(set(column.tolist())) > 1]
        raise RuntimeError(f"the masks differ between ranks in {', '.join(wrong[:5])}: please report this as a bug")


def _fingerprint(mask: Tensor) -> Tensor:
    kept = mask.reshape(-1).nonzero().reshape(-1)
    return ((kept + 1) * 2654435761 % 2**31).sum() + kept.numel()
