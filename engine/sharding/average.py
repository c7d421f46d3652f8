"""A moving average of the weights (EMA): how it follows them, and how the network that is delivered is made of it.

a <- a + (1 - d) (w - a) after every update, with d = min(decay, (1 + t) / (10 + t)) after t updates: a short run's
average is not that of its first weights. w: the state tensor "weight", which stays what is trained.
"""

from __future__ import annotations

from torch import Tensor

from ghostmask.engine.sharding.reparametrization import State

AVERAGE = "average"
"""The state tensor that holds it."""


def share(decay: float, updates: int) -> float:
    """1 - d after update number `updates`, from 0."""
    return 1.0 - min(decay, (1 + updates) / (10 + updates))


def follow(average: Tensor, value: Tensor, decay: float, updates: int) -> None:
    """The average after update number `updates`, in place; the same bits however a vector is cut."""
    average.add_((value - average).mul_(share(decay, updates)))


def delivered(state: State) -> State:
    """The state with the average, if there is one, in the place of the weights."""
    return {**state, "weight": state[AVERAGE]} if AVERAGE in state else state
