"""Where a run is, and how long a part of it takes: Position and Duration."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ghostmask.engine.errors import InputError

LARGEST = 1e9
"""Of a duration, in either unit."""


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit: "90ep" (epochs), "500st" (optimizer steps)."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str | int | float, field: str = "duration") -> Duration:
        """From "90ep", "500st", or a bare number of epochs. Raises InputError that names `field`."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ep|st)?\s*", str(text))
        if not match:
            raise InputError(f"{field} = {text!r}: give epochs or steps, such as 5ep or 500st")
        amount = float(match.group(1))
        if amount > LARGEST:
            raise InputError(f"{field} = {text!r}: give at most {LARGEST:g}{match.group(2) or 'ep'}")
        return cls(amount, match.group(2) or "ep")

    def steps(self, steps_per_epoch: int) -> int:
        """The same length in optimizer steps, rounded."""
        return round(self.amount * steps_per_epoch) if self.unit == "ep" else round(self.amount)

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"


def require_steps(field: str, text: str, steps_per_epoch: int, total: int, what: str) -> None:
    """Raise the InputError of `field` = `text` where that duration is more than `total` steps, or is above 0 and rounds
    to no step. what: what has the steps, such as "the main phase has"."""
    duration = Duration.parse(text, field)
    steps = duration.steps(steps_per_epoch)
    if steps > total:
        epochs = -(-steps // steps_per_epoch)
        raise InputError(
            f"{field} = {text!r}: is {steps} steps, {what} {total}; give at most {total}st, or train.epochs={epochs}"
        )
    if steps == 0 and duration.amount > 0:
        raise InputError(f"{field} = {text!r}: rounds to no step (an epoch has {steps_per_epoch}); give 1st, or 0ep")


@dataclass(frozen=True)
class Phase:
    """One stretch of a run with an optimizer of its own, e.g. "search" then "finetune".

    first_epoch counts from the start of the run, so no two phases share an epoch's data order.
    """

    name: str
    first_epoch: int
    epochs: int
    steps_per_epoch: int

    @property
    def first_step(self) -> int:
        """Global number of the first optimizer step of this phase."""
        return self.first_epoch * self.steps_per_epoch

    @property
    def end_step(self) -> int:
        """Global number of the step after the last one."""
        return self.first_step + self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Position:
    """`step` optimizer steps of the whole run are done, the last ones in `phase`."""

    phase: str
    step: int
    steps_per_epoch: int
    batch_size: int

    @property
    def epoch(self) -> int:
        """Global epoch that the next step belongs to."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Steps of that epoch that are done."""
        return self.step % self.steps_per_epoch

    @property
    def samples(self) -> int:
        """Training samples seen by all ranks since the start of the run."""
        return self.step * self.batch_size
