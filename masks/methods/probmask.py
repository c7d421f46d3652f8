"""probmask: every weight has a probability of being kept; weights and probabilities are trained together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ghostmask.engine.batchnorm import batch_statistics
from ghostmask.engine.compiled import agree_on_kernels
from ghostmask.engine.config import require
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.evaluation import score
from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Reparametrization
from ghostmask.engine.sharding.rules import UpdateRule
from ghostmask.masks.kernels import KERNELS
from ghostmask.masks.masked import PRUNABLE, FixedMask
from ghostmask.masks.method import FINETUNE, MaskMethod, Setup
from ghostmask.masks.relaxed import RelaxedMask, Search
from ghostmask.masks.relaxed_channels import RelaxedChannels
from ghostmask.masks.relaxed_kernels import RelaxedKernels
from ghostmask.masks.report import ProbabilityReport
from ghostmask.masks.schedules import DECIDING, LARGEST_RATE, PAPER_RATE, probability_rate
from ghostmask.masks.scoring.topk import Units
from ghostmask.masks.settings import Noisy, Ranked, Scheduled, choice, n_of_m, number
from ghostmask.masks.units.blocks import Kernels
from ghostmask.masks.units.channels import Channels

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer

OF_WEIGHTS = {"lr", "momentum", "nesterov", "weight_decay", "decay_norms", "scale_lr", "lars", "lars_trust"}
"""Settings of `optim` that probabilities do not read."""
CANDIDATE_BATCHES = 50
"""Training batches on which final=best_of compares its candidates."""


@dataclass(frozen=True)
class Settings(Ranked, Scheduled, Noisy):
    """probmask."""

    lr: float = number(0.0, 0)
    """Peak learning rate of Adam on the probabilities; 0 = derived from the steps of the search, as how far they get is
    rate x steps: 41 / steps, at least the paper's 6e-3 (from 6,834 steps on) and at most 0.12. What comes out is said
    when the search starts, and by `ghostmask show config` where the data are prepared."""
    samples: int = number(2, 1, 10_000)
    """Noise samples I that every part of the batch is computed with, over which the loss is averaged (eq. 3-5)."""
    temperature_end: float = number(0.03, 0, 1, above=True)
    """Temperature in the last epoch; tau = (1 - temperature_end)(1 - t/T) + temperature_end in epoch t = 1 ... T."""
    rate_rule: ClassVar[str] = (
        f"{DECIDING:g} / steps of the search, at least {PAPER_RATE:g} and at most {LARGEST_RATE:g}"
    )
    """What mask.lr = 0 becomes."""
    train_weights: bool = True
    """false = supermask: the weights stay at their initialisation and only probabilities are trained."""
    final: str = choice("topk", "sample", "best_of")
    """How the final mask comes from s: topk (exactly round(density n) largest), sample, or best_of."""
    candidates: int = number(10, 1, 1e5)
    """Masks that final=best_of samples and compares on training data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.candidates == 10 or self.final == "best_of",
            "mask.candidates", self.candidates, f"is not read with mask.final={self.final}; leave it out",
        )  # fmt: skip
        require(
            self.final == "topk" or n_of_m(self.granularity) is None,
            "mask.final", self.final, f"a sample keeps no mask to {self.granularity}; use topk",
        )  # fmt: skip
        require(
            self.granularity != "channel" or self.constraint == "global",
            "mask.constraint", self.constraint, "channels cost what the layers around them keep: use global",
        )  # fmt: skip

    def rate(self, steps: int) -> float:
        """The peak rate of the probabilities in a search of `steps` steps."""
        return self.lr or probability_rate(steps)

    def falls(self, epochs: int) -> bool:
        """Whether there is an epoch in which the density falls, and a later one that trains at the target."""
        start, end = self.window(int, epochs)
        return start < end < epochs


class ProbMask(MaskMethod):
    """Algorithm 1 of "Effective Training of Sparse Neural Networks under Global Sparsity Constraint".

    min over w, s of E_{m ~ Bernoulli(s)} L(w m)  subject to  sum(s) <= K, 0 <= s <= 1  (problem 2). Phase "search"
    trains w (SGD) and s (Adam, projected after every update) through relaxed masks; its end fixes the mask
    (mask.final); phase "finetune" trains the surviving weights under it. mask.train_weights=false is the supermask
    mode: only s is trained.
    """

    Settings = Settings
    searches = True
    finetunes = True
    paper = (
        'Zhou et al. 2021, "Effective Sparsification of Neural Networks with Global Sparsity Constraint", '
        "https://arxiv.org/abs/2105.01571"
    )
    aliases = ("supermask mask.train_weights=false", "probabilistic", "bernoulli mask.final=sample")

    @classmethod
    def check(cls, settings: Any, run: Any) -> None:
        settings.require_fall("train.epochs", run.train.epochs, settings.falls)
        if settings.train_weights:
            return
        chosen, fix = "mask.train_weights=false", "mask.train_weights=true"
        why = f"scales weights for the first step that they take, and {chosen} leaves them as they were drawn"
        require(not run.tost.lrsi, "tost.lrsi", True, f"{why}; give false")
        unread = set() if run.tost.ghost_skip else OF_WEIGHTS  # ghosts are trained
        for name in sorted(run.given("optim") & unread):
            raise run.not_read("optim", name, chosen, fix)
        if run.finetune.epochs > 0:
            for name in sorted(run.given("finetune")):
                raise run.not_read("finetune", name, chosen, f"{fix}, or finetune.epochs=0")

    @classmethod
    def ends_under_one_mask(cls, settings: Any, run: Any) -> bool:
        return bool(run.finetune.epochs > 0 and settings.train_weights)

    def phases(self) -> tuple[tuple[str, int], ...]:
        epochs = self.recipe.finetune.epochs if self.settings.train_weights else 0
        return (("search", self.recipe.epochs), (FINETUNE, epochs))

    def reparametrization(self, phase: Phase) -> Reparametrization:
        if phase.name == FINETUNE:
            return FixedMask(self.rule(), self.found or None, self.counts())
        s = self.settings
        start, end = s.window(int, phase.epochs)
        search = Search(
            s.density, s.constraint, s.temperature_end, start, end, phase.epochs, phase.steps_per_epoch,
            self.recipe.seed,
        )  # fmt: skip
        rule, rate = self.rule() if s.train_weights else None, self.rate(phase) / self.recipe.optim.lr
        return relaxed_form(search, rule, rate, self.units)

    def rate(self, phase: Phase) -> float:
        """Peak rate of the probabilities in a search."""
        found: float = self.settings.rate(phase.epochs * phase.steps_per_epoch)
        return found

    def groups(self, form: Reparametrization, lr: float) -> list[ParameterGroup]:
        groups = super().groups(form, lr)
        frozen = isinstance(form, RelaxedMask) and not self.settings.train_weights
        for group in groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(not frozen or group.name == PRUNABLE)
        return groups[:1] if frozen else groups

    def enter(self, phase: Phase) -> Setup:
        if phase.name != FINETUNE:
            agree_on_kernels(self.world, KERNELS)
        return replace(super().enter(phase), passes=1 if phase.name == FINETUNE else self.settings.samples)

    def begin(self, phase: Phase, data: DataPipeline, say: Callable[[str], None]) -> None:
        if phase.name != FINETUNE and phase.epochs > 0 and not self.settings.lr:
            steps = phase.epochs * phase.steps_per_epoch
            say(f"mask.lr = {self.rate(phase):.4g}, derived from {steps:,} steps of the search")
        super().begin(phase, data, say)

    def hooks(self, phase: Phase, form: Reparametrization) -> Sequence[Hook]:
        return (ProbabilityReport(form),) if isinstance(form, RelaxedMask) else super().hooks(phase, form)

    def leave(self, trainer: Trainer) -> None:
        if trainer.phase.name == "search":
            self._choose(trainer)
        super().leave(trainer)

    def counts(self) -> Sequence[int] | None:
        return super().counts() if self.settings.final == "topk" else None

    def _choose(self, trainer: Trainer) -> None:
        """Fix the mask that is delivered: see mask.final."""
        optimizer = trainer.sharded.optimizer
        group, state, part = optimizer.group(PRUNABLE)
        form = group.reparametrization
        assert isinstance(form, RelaxedMask)
        with torch.no_grad():
            # A run that ends before the density was reached: onto the final budget first, so that no tie decides.
            form.density = form.search.density
            form.constrain(state, part, trainer.num_updates)
            if self.settings.final == "topk":
                return
            best: tuple[float, int] = (-1.0, 0)
            for candidate in range(self.settings.candidates) if self.settings.final == "best_of" else ():
                form.fixed = form.sampled(state, part, candidate)
                best = max(best, (self._accuracy(trainer), -candidate))
            form.fixed = form.sampled(state, part, -best[1])

    def _accuracy(self, trainer: Trainer) -> float:
        """On training images, batch norm in batch-statistics mode."""
        optimizer = trainer.sharded.optimizer
        optimizer.eval()
        with batch_statistics(trainer.model), closing(trainer.data.train(trainer.phase.first_epoch)) as batches:
            some = islice(batches, CANDIDATE_BATCHES)
            accuracy = score(trainer.model, some, self.world, trainer.config.precision).accuracy
        optimizer.train()
        return accuracy


def relaxed_form(search: Search, rule: UpdateRule | None, rate: float, units: Units | None) -> RelaxedMask:
    """The reparametrization whose probabilities are of these units; see `RelaxedMask`."""
    if isinstance(units, Channels):
        return RelaxedChannels(replace(search, units=units), rule, rate, units)
    if not isinstance(units, Kernels):
        return RelaxedMask(replace(search, units=units), rule, rate)
    units = replace(units, by_layer=False)
    search = replace(search, units=units)
    if max(units.lengths.values()) == 1:
        return RelaxedMask(search, rule, rate)
    return RelaxedKernels(search, rule, rate, units)
