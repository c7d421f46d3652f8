"""How do all ranks learn what one of them did, or that it failed?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ghostmask.engine.errors import InputError, RunStopped
from ghostmask.engine.world import World

T = TypeVar("T")
Failure = tuple[str, int | None]
"""What went wrong in one line, and the exit code of a run that must stop (None: of an error)."""
Describe = Callable[[Exception], str]


def on_main(world: World, action: Callable[[], T], error: type[InputError] = InputError, describe: Describe = str) -> T:
    """Collective: rank 0's action(), its result (picklable) on every rank.

    Where it fails, every rank raises the same: RunStopped as it is, anything else as `error`, described.
    """
    outcome: tuple[T | None, Failure | None] = (None, None)
    if world.is_main:
        outcome = _attempt(action, describe)
    value, failure = world.broadcast_object(outcome)
    _raise(failure, error)
    return value  # type: ignore[no-any-return]


def on_all(
    world: World, action: Callable[[], None], error: type[InputError] = InputError, describe: Describe = str
) -> None:
    """Collective: every rank's action(); where one fails, every rank raises what the first of them did."""
    failures = world.all_gather_object(_attempt(action, describe)[1])
    _raise(next((failure for failure in failures if failure is not None), None), error)


def _attempt(action: Callable[[], T], describe: Describe) -> tuple[T | None, Failure | None]:
    try:
        return action(), None
    except RunStopped as stop:
        return None, (str(stop), stop.exit_code)
    except Exception as failure:
        return None, (describe(failure), None)


def _raise(failure: Failure | None, error: type[InputError]) -> None:
    if failure is not None:
        text, exit_code = failure
        raise error(text) if exit_code is None else RunStopped(text, exit_code)
