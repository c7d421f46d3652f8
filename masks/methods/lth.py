"""lth: rounds of training, each followed by pruning the smallest weights and rewinding the rest (lottery tickets)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ghostmask.engine.batchnorm import average_buffers
from ghostmask.engine.config import require
from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Duration, Phase
from ghostmask.engine.trainer import Trainer
from ghostmask.masks.masked_model import FixedMasks, MaskedModel, key
from ghostmask.masks.method import MaskMethod, Setup, check_agreement
from ghostmask.masks.one_shot import report
from ghostmask.masks.report import DensityReport
from ghostmask.masks.scoring.allocation import kept_masks


class LotteryTicket(MaskMethod):
    """Iterative magnitude pruning with rewinding (Frankle & Carbin 2019; Frankle et al. 2020).

        round0   dense            -> prune 20 % -> rewind
        round1   density 0.8      -> prune 20 % -> rewind
        ...
        roundR   the density asked for; its weights are the result

    Each round is a phase of train.epochs under the whole learning-rate schedule. The rewind point, weights and batch
    norm after mask.rewind of round 0 (0: the initialisation), travels in every checkpoint.
    """

    every_phase_has_a_result = True
    protects = True
    rewindable: RewindableMasks | None = None

    def phases(self) -> tuple[tuple[str, int], ...]:
        return tuple((f"round{i}", self.recipe.epochs) for i in range(len(self.densities())))

    def densities(self) -> list[float]:
        """The density of each round: 1, 1 - f, (1 - f)^2, ..., mask.density, with f = mask.round_fraction."""
        densities, left = [], 1.0
        while left > self.config.density * (1 + 1e-9):
            densities.append(left)
            left *= 1 - self.config.round_fraction
        return [*densities, self.config.density]

    def enter(self, phase: Phase) -> Setup:
        if self.rewindable is None:  # on a resume the checkpoint's masks and rewind point take the place of these
            full = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()}
            self.rewindable = RewindableMasks(full, self.net)
        model = MaskedModel(self.net, list(self.weights), self.rewindable)
        hooks: list[Hook] = [DensityReport(self.rewindable)]
        rewind = Duration.parse(self.config.rewind).steps(phase.steps_per_epoch)
        steps = phase.epochs * phase.steps_per_epoch
        require(rewind <= steps, "mask.rewind", self.config.rewind, f"a round has {steps} steps; give at most that")
        if phase.first_epoch == 0 and rewind > 0:
            hooks.append(_Remember(self.rewindable, self.net, rewind))
        return Setup(model, [self.weight_group(phase)], hooks)

    def leave(self, trainer: Trainer) -> None:
        """Prune and rewind, here and not in begin(): the next phase's optimizer copies the weights when it is built."""
        assert self.rewindable is not None
        following = int(trainer.phase.name.removeprefix("round")) + 1
        config, densities = self.config, self.densities()
        if following == len(densities):
            return
        present = self.rewindable.masks()
        masks = surviving(self.weights, present, densities[following], config.constraint, config.min_per_layer)
        check_agreement(masks, self.world)
        for line in report(masks, self.protects):
            trainer.reporter.progress.message(line)
        self.rewindable.replace(list(masks.values()))
        self.rewindable.rewind(self.net)

    def masks(self) -> Mapping[str, Tensor]:
        assert self.rewindable is not None
        return self.rewindable.masks()


class RewindableMasks(FixedMasks):
    """FixedMasks that also keep a copy of a network's whole state, as buffers: the point that rounds rewind to."""

    def __init__(self, masks: Mapping[str, Tensor], net: nn.Module) -> None:
        super().__init__(masks)
        for name, tensor in net.state_dict().items():
            self.register_buffer(f"rewind/{key(name)}", tensor.detach().clone())

    @torch.no_grad()
    def remember(self, net: nn.Module) -> None:
        """Make the network's present state the point to rewind to."""
        for name, tensor in net.state_dict().items():
            self.get_buffer(f"rewind/{key(name)}").copy_(tensor)

    @torch.no_grad()
    def rewind(self, net: nn.Module) -> None:
        """Bring the network back to it, in place."""
        for name, tensor in net.state_dict().items():
            tensor.copy_(self.get_buffer(f"rewind/{key(name)}"))


class _Remember(Hook):
    """Collective: takes the rewind point when `step` updates of the phase are done."""

    def __init__(self, rewindable: RewindableMasks, net: nn.Module, step: int) -> None:
        self.rewindable, self.net, self.step = rewindable, net, step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.num_updates == self.step:
            average_buffers(self.net, trainer.world)  # the rewind point is one, batch norm's statistics are each rank's
            self.rewindable.remember(self.net)


def surviving(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], density: float, constraint: str, min_per_layer: int = 0
) -> dict[str, Tensor]:
    """Masks at the new density: the largest |w| among those that `masks` keep; nothing pruned returns."""
    scores = [torch.where(masks[n], w.detach().abs(), torch.full_like(w, -1.0)) for n, w in weights.items()]
    return dict(zip(weights, kept_masks(scores, density, constraint, min_per_layer), strict=True))
