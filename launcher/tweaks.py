"""How are the tweaks of ToST laid around what a mask method trains in a phase?"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

from torch import nn

from ghostmask.engine.hooks import Hook
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.layerwise import sgd_of
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Plain
from ghostmask.launcher.config import RunConfig
from ghostmask.masks.masked import present_masks
from ghostmask.masks.method import FINETUNE, Setup
from ghostmask.models.ghosts import GhostedModel, Ghosts
from ghostmask.models.tost import GHOST, ActivationSparsity, GhostSkip, GhostSwish, Rescaling, ghost_alpha


def with_tweaks(setup: Setup, config: RunConfig, net: nn.Module, phase: Phase, step: int) -> Setup:
    """What the phase trains from `step` on: the method's setup and, in every phase but fine-tuning, ToST's tweaks.

    net: the plain network inside setup.model, on its device. What is left of a schedule is a function of step.
    """
    tost = config.tost
    model, groups, hooks = setup.model, list(setup.groups), list[Hook](setup.hooks)
    if phase.name != FINETUNE and phase.epochs > 0:
        done = (step - phase.first_step) / (phase.end_step - phase.first_step)
        if tost.ghost_skip:
            ghosts = None
            if ghost_alpha(done, tost.ghost_skip_fraction) > 0:
                ghosts = Ghosts(net, _seed(config.seed, phase))
                form, lr = Plain({"weight": sgd_of(config.optim)}), config.optim.lr * config.lr_scale
                groups.append(ParameterGroup(GHOST, dict(ghosts.named_parameters()), form, lr))
            ghosted = GhostedModel(model, ghosts)
            hooks.append(GhostSkip(tost, ghosted))
            model = ghosted
        if tost.ghost_swish:
            hooks.append(GhostSwish(tost, net))
        if tost.lrsi:  # last: it is learned for the network that the first step trains
            hooks.append(Rescaling(tost, net, lambda trainer: present_masks(trainer.sharded.optimizer)))
    if tost.log_activation_sparsity:
        hooks.append(ActivationSparsity(net))
    return replace(setup, model=model, groups=groups, hooks=hooks)


def _seed(seed: int, phase: Phase) -> int:
    return int.from_bytes(sha256(f"{seed} ghost skips {phase.name}".encode()).digest()[:8], "big")
