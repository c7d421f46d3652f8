"""The named points of the training loop at which others act.

    hook.on_start(trainer)                         # once per phase; after a resume, with the resumed state
    for each epoch:
        hook.on_epoch_start(trainer)
        for each step:
            hook.on_step_start(trainer)
            [for each part: its images and targets = hook.on_part(trainer, number, part)]
            [for each noise sample, for each part of the batch: forward, backward]
            [all ranks agree that the loss is finite]
            [optimizer update, constraint, the next step's weights]
            hook.on_step_end(trainer)              # position already counts the step
        hook.on_epoch_end(trainer)                 # after the evaluation, before the checkpoint
    hook.on_stop(trainer)                          # also when the loop ends by an exception

Hooks run in the order given to the trainer. What a hook must not forget goes into `state_dict` (JSON-able) or
`tensors`; both are in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ghostmask.engine.data import PartBatch
    from ghostmask.engine.metrics import Counts
    from ghostmask.engine.trainer import Trainer


class Hook:
    """Acts at named points of the loop; every method may be left out."""

    name: str = ""
    """Key of this hook's state in a checkpoint; hooks with state need one."""
    shown: str = ""
    """Which of its `scalars` stands in the progress line too, under the last part of its name."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of a phase, or of what a resume left of it."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Before the first batch of an epoch, or the first one left after a resume in its middle."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Before the first forward pass of a step."""

    def on_part(self, trainer: Trainer, number: int, part: PartBatch) -> PartBatch:
        """Other images or targets for a part of the step's batch; number: among all parts of the batch, on any rank.

        A function of the step, the number and the images alone. Called once, however many noise samples the part is
        computed with.
        """
        return part

    def on_step_end(self, trainer: Trainer) -> None:
        """After the optimizer update; `trainer.position` counts this step."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch's evaluation, before its checkpoint."""

    def on_stop(self, trainer: Trainer) -> None:
        """When the loop ends, for whatever reason. Not collective: other ranks may be gone."""

    def scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        """Numbers to log with the loss every train.log_every steps. Called on every rank; may be collective."""
        return {}

    def histograms(self, trainer: Trainer) -> Mapping[str, Tensor | Counts]:
        """What to log as histograms, once per epoch; Counts are of layers, by "group/layer". Called on every rank; may
        be collective."""
        return {}

    def epoch_scalars(self, trainer: Trainer) -> Mapping[str, float | Tensor]:
        """Numbers to log once per epoch. Called on every rank; may be collective."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, JSON-able."""
        return {}

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint must hold for it, equal on every rank; a resume fills them in place."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
