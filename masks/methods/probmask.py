"""probmask: every weight has a probability of being kept; weights and probabilities are trained together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor

from ghostmask.engine.batchnorm import batch_statistics
from ghostmask.engine.evaluation import score
from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.optimizer import Adam, ParameterGroup
from ghostmask.engine.sharding.shards import Shard
from ghostmask.engine.trainer import Trainer
from ghostmask.masks.kernels.noise import NoiseKey
from ghostmask.masks.kernels.projection import project_, project_layers_
from ghostmask.masks.masked_model import FixedMasks, MaskedModel
from ghostmask.masks.method import FINETUNE, MaskMethod, Setup, check_agreement
from ghostmask.masks.relaxed_model import RelaxedMasks
from ghostmask.masks.report import DensityReport
from ghostmask.masks.schedules import cubic_density, linear_temperature
from ghostmask.masks.scoring.allocation import kept_masks
from ghostmask.masks.scoring.sampling import bernoulli_masks

CANDIDATE_BATCHES = 50
"""Training batches per rank on which final=best_of compares its candidates."""


class ProbMask(MaskMethod):
    """Algorithm 1 of "Effective Training of Sparse Neural Networks under Global Sparsity Constraint".

    min over w, s of E_{m ~ Bernoulli(s)} L(w m)  subject to  sum(s) <= K, 0 <= s <= 1  (problem 2). Phase "search"
    trains w (SGD) and s (Adam, projected after every update) through relaxed masks; its end fixes the mask
    (mask.final); phase "finetune" trains the surviving weights under it. mask.train_weights=false is the supermask
    mode: only s is trained.
    """

    relaxed: RelaxedMasks
    fixed: FixedMasks | None = None

    def phases(self) -> tuple[tuple[str, int], ...]:
        epochs = self.recipe.finetune.epochs if self.config.train_weights else 0
        return (("search", self.recipe.epochs), (FINETUNE, epochs))

    def enter(self, phase: Phase) -> Setup:
        return self._enter_search(phase) if phase.name == "search" else self._enter_finetune(phase)

    def leave(self, trainer: Trainer) -> None:
        if trainer.phase.name != "search":
            return
        masks = self._choose(trainer)
        check_agreement(masks, self.world)
        self.fixed = FixedMasks(masks)

    def masks(self) -> Mapping[str, Tensor]:
        assert self.fixed is not None
        return self.fixed.masks()

    def _enter_search(self, phase: Phase) -> Setup:
        self.relaxed = RelaxedMasks(self.weights, self.config.constraint).to(self.world.device)
        search = _Search(self, self.relaxed)
        probabilities = ParameterGroup(
            "probability",
            self.relaxed.probabilities(),
            Adam(),
            self.config.lr,
            search.project,
            self.config.gradient_bf16,
        )
        groups = [self.weight_group(phase), probabilities]
        if not self.config.train_weights:
            self.net.requires_grad_(False)
            groups = [probabilities]
        model = MaskedModel(self.net, list(self.weights), self.relaxed)
        return Setup(model, groups, [search], passes=self.config.samples)

    def _enter_finetune(self, phase: Phase) -> Setup:
        if self.fixed is None:  # a resume: the checkpoint's masks take the place of these
            self.fixed = FixedMasks({n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()})
        model = MaskedModel(self.net, list(self.weights), self.fixed)
        self.net.requires_grad_(True)
        return Setup(model, [self.weight_group(phase)], [DensityReport(self.fixed)])

    def _choose(self, trainer: Trainer) -> dict[str, Tensor]:
        probabilities = {n: s.detach() for n, s in self.relaxed.probabilities().items()}
        if self.config.final == "topk":
            masks = kept_masks(list(probabilities.values()), self.config.density, self.config.constraint)
            return dict(zip(probabilities, masks, strict=True))
        if self.config.final == "sample":
            return bernoulli_masks(probabilities, self.recipe.seed, candidate=0)
        return self._best_of(trainer, probabilities)

    def _best_of(self, trainer: Trainer, probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The Bernoulli sample with the best accuracy on training images, batch norm in batch-statistics mode."""
        best: tuple[float, int] = (-1.0, 0)
        for candidate in range(self.config.candidates):
            masks = bernoulli_masks(probabilities, self.recipe.seed, candidate)
            model = MaskedModel(self.net, list(self.weights), FixedMasks(masks))
            with batch_statistics(model):
                batches = islice(trainer.data.train(trainer.phase.first_epoch), CANDIDATE_BATCHES)
                accuracy = score(model, batches, self.world, trainer.config.precision).accuracy
            best = max(best, (accuracy, -candidate))
        return bernoulli_masks(probabilities, self.recipe.seed, -best[1])


class _Search(Hook):
    """Per epoch: temperature and density; per forward pass: fresh noise; after each update: the projection."""

    def __init__(self, method: ProbMask, relaxed: RelaxedMasks) -> None:
        self.config, self.world, self.seed = method.config, method.world, method.recipe.seed
        self.relaxed = relaxed
        self.threshold: float | Tensor = 0.0

    def on_epoch_start(self, trainer: Trainer) -> None:
        epoch, total = trainer.position.epoch - trainer.phase.first_epoch, trainer.phase.epochs
        start, end = self.config.start_fraction * total, self.config.end_fraction * total
        self.relaxed.set_temperature(linear_temperature(epoch, total, self.config.temperature_end))
        self.relaxed.density = cubic_density(epoch, start, end, self.config.density)
        # On the CPU convolutions bring weights into an order of their own anyway.
        self.relaxed.channels_last = trainer.config.channels_last and self.world.device.type == "cuda"

    def on_forward(self, trainer: Trainer, microstep: int) -> None:
        rank = self.world.rank if self.config.noise == "per_rank" else 0
        self.relaxed.set_noise(NoiseKey(self.seed, trainer.position.step, microstep, rank))

    def project(self, shard: Shard) -> None:
        """Collective: s <- proj_C(s), eq. 6, over the network or over each layer."""
        density, sizes = self.relaxed.density, [s.numel() for s in self.relaxed.probabilities().values()]
        if self.config.constraint == "global":
            self.threshold = project_(
                shard.tensor,
                density * sum(sizes),
                sum(sizes),
                shard.first_index,
                self.world,
                replicated=shard.replicated,
            )
            return
        layers = {name: index for index, name in enumerate(self.relaxed.names)}
        segments = [(s.start, s.numel, layers[s.name]) for s in shard.segments]
        budgets = [density * n for n in sizes]
        project_layers_(
            shard.tensor, segments, budgets, sizes, shard.first_index, self.world, replicated=shard.replicated
        )

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        every = list(self.relaxed.probabilities().values())
        total = sum(s.numel() for s in every)
        mass = torch.stack([s.detach().sum(dtype=torch.float64) for s in every]).sum()
        decided = torch.stack([((s.detach() < 0.01) | (s.detach() > 0.99)).sum() for s in every]).sum()
        return {
            "mask/temperature": self.relaxed.get_buffer("temperature"),
            "mask/density_target": self.relaxed.density,
            "mask/density": mass / total,
            "mask/decided_fraction": decided / total,
            "mask/threshold": self.threshold,
        }

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        return {f"density/{n}": s.detach().mean() for n, s in self.relaxed.probabilities().items()}

    def histograms(self, trainer: Trainer) -> Mapping[str, Tensor]:
        return {f"probability/{n}": s.detach() for n, s in self.relaxed.probabilities().items()}
