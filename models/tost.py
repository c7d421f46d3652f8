"""How do the ToST tweaks act on one phase of training? Each is a hook; the schedules are functions of the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from itertools import count

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ghostmask.engine.batchnorm import batch_statistics
from ghostmask.engine.data import Batch, DataPipeline
from ghostmask.engine.hooks import Hook
from ghostmask.engine.precision import autocast
from ghostmask.engine.trainer import Trainer
from ghostmask.models.activations import require_relus, soften, zeros_after_activations
from ghostmask.models.config import TostConfig
from ghostmask.models.ghosts import GhostedModel
from ghostmask.models.rescaling import Rescaled, learn_factors

GHOST = "ghost"
"""Parameter group of the ghost skips."""


def ghost_alpha(done: float, fraction: float) -> float:
    """alpha of the ghost skips when the fraction `done` of the phase is over: linear from 1 to 0 at `fraction`."""
    return max(0.0, 1.0 - done / fraction)


def pswish_beta(done: float, fraction: float, end: float) -> float:
    """beta of PSwish when `done` of the phase is over: end^(done / fraction) from 1 on, inf from `fraction` on."""
    return math.inf if done >= fraction else end ** (done / fraction)


class GhostSkip(Hook):
    """Fades the ghosts of `model` out and then removes them: module, parameter group, optimizer state, hooks."""

    def __init__(self, config: TostConfig, model: GhostedModel) -> None:
        self.fraction, self.model = config.ghost_skip_fraction, model

    def on_start(self, trainer: Trainer) -> None:
        if self.model.ghosts is not None:
            self.model.ghosts.set_alpha(self._alpha(trainer))
            self.model.ghosts.attach()

    def on_step_end(self, trainer: Trainer) -> None:
        if self.model.ghosts is None:
            return
        alpha = self._alpha(trainer)
        if alpha > 0:
            self.model.ghosts.set_alpha(alpha)
        else:
            self.model.remove()
            trainer.release({GHOST})

    def on_stop(self, trainer: Trainer) -> None:
        if self.model.ghosts is not None:
            self.model.ghosts.detach()

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        return {"tost/alpha": self._alpha(trainer)}

    def _alpha(self, trainer: Trainer) -> float:
        return ghost_alpha(trainer.done_fraction, self.fraction)


class GhostSwish(Hook):
    """Trains `net` with a soft activation in place of its ReLUs for the first part of the phase."""

    def __init__(self, config: TostConfig, net: nn.Module) -> None:
        require_relus(net)
        self.config, self.net = config, net
        self._beta = torch.ones((), device=next(net.parameters()).device)
        self._harden: Callable[[], None] | None = None

    def on_start(self, trainer: Trainer) -> None:
        beta = self._value(trainer)
        if beta < math.inf:
            self._harden = soften(self.net, self.config.activation, self._beta.fill_(beta))

    def on_step_end(self, trainer: Trainer) -> None:
        beta = self._value(trainer)
        if beta < math.inf:
            self._beta.fill_(beta)
        elif self._harden is not None:
            self.on_stop(trainer)
            trainer.forget_compiled()

    def on_stop(self, trainer: Trainer) -> None:
        if self._harden is not None:
            self._harden()
            self._harden = None

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        """tost/soft: 1 until the activation is ReLU, 0 afterwards; tost/beta: of PSwish while there is one."""
        beta = self._value(trainer)
        scheduled = self.config.activation == "pswish" and beta < math.inf
        return {"tost/soft": float(beta < math.inf), **({"tost/beta": beta} if scheduled else {})}

    def _value(self, trainer: Trainer) -> float:
        return pswish_beta(trainer.done_fraction, self.config.swish_fraction, self.config.swish_beta_end)


class Rescaling(Hook):
    """LRsI: before the first step of the phase, multiplies every parameter tensor of `net` by its learned factor.

    The factors are learned for the network that would be delivered, with its pruned weights at zero, where they stay
    in the look-ahead step too.
    """

    def __init__(
        self, config: TostConfig, net: nn.Module, masks: Callable[[Trainer], Mapping[str, Tensor]] = lambda _: {}
    ) -> None:
        """masks: collective; name -> bool tensor, True where a weight of the network is not pruned."""
        self.config, self.net, self.masks = config, net, masks

    def on_start(self, trainer: Trainer) -> None:
        if trainer.num_updates > 0:
            return
        trainer.world.pulse.enter("LRsI")
        optimizer = trainer.sharded.optimizer
        optimizer.eval()
        learned = self._learn(trainer)
        optimizer.train()
        optimizer.scale(learned.factors)
        self._report(trainer, learned)

    def _learn(self, trainer: Trainer) -> Rescaled:
        config, masks = self.config, self.masks(trainer)

        def logits(parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
            weights = {name: p * masks[name] if name in masks else p for name, p in parameters.items()}
            result: Tensor = functional_call(self.net, weights, (images,))
            return result

        parameters = {name: p.detach().float() for name, p in self.net.named_parameters()}
        with ExitStack() as stack:
            stack.enter_context(batch_statistics(trainer.model))
            batches = stack.enter_context(closing(_endless(trainer.data, trainer.phase.first_epoch)))
            return learn_factors(
                logits, parameters, batches, trainer.world, steps=config.lrsi_steps, lr=config.lrsi_lr,
                eta=config.lrsi_eta, gamma=config.lrsi_gamma, normalize=config.lrsi_normalize,
            )  # fmt: skip

    def _report(self, trainer: Trainer, learned: Rescaled) -> None:
        norms, losses, factors = learned.gradient_norms, learned.losses, learned.factors.values()
        values = {
            "lrsi/gradient_norm_first": norms[0],
            "lrsi/gradient_norm_last": norms[-1],
            "lrsi/factor_min": min(factors),
            "lrsi/factor_max": max(factors),
            **({"lrsi/loss_first": losses[0], "lrsi/loss_last": losses[-1]} if losses else {}),
        }
        # The number of the first step to come: a line of an earlier step would stay when the phase starts again.
        position = trainer.position
        trainer.reporter.writer.scalars(
            position.step + 1, values, phase=position.phase, epoch=position.epoch, samples=position.samples
        )
        trainer.reporter.progress.message(
            f"LRsI: gradient norm {norms[0]:.3g} -> {norms[-1]:.3g}, factors {min(factors):.3g} to {max(factors):.3g}"
        )


class ActivationSparsity(Hook):
    """Logs the share of exact zeros after each activation of `net`, on one evaluation batch per rank."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        with closing(_evaluation(trainer.data)) as batches:
            batch = next(batches, None)
        precision = autocast(trainer.world.device, trainer.config.precision)
        with trainer.evaluation_weights(), precision, torch.no_grad():
            # A rank without evaluation images counts on an empty batch: the names are the same on every rank.
            images = batch.images if batch else torch.zeros(0, *trainer.data.image_shape, device=trainer.world.device)
            counts = zeros_after_activations(self.net, lambda: trainer.model(images))
        pairs = torch.tensor([[float(zeros), total] for zeros, total in counts.values()], dtype=torch.float64)
        zeros, total = trainer.world.all_reduce(pairs.to(trainer.world.device)).T
        return {f"zeros/{name}": share for name, share in zip(counts, (zeros / total).tolist(), strict=True)}


def _endless(data: DataPipeline, first_epoch: int) -> Generator[list[Batch], None, None]:
    """The training batches of one epoch after the other, each as this rank's parts."""
    for epoch in count(first_epoch):
        with closing(data.train(epoch)) as batches:
            for images, labels in batches:
                parts = zip(images.chunk(data.parts.count), labels.chunk(data.parts.count), strict=True)
                yield [Batch(*part) for part in parts]


def _evaluation(data: DataPipeline) -> Generator[Batch, None, None]:
    yield from data.evaluate()
