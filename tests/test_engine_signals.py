"""Signals in a process: an exception that cannot get lost, and an evaluation that all ranks leave together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_data import MemoryData
from memory_run import CONFIG, configured, memory_run

from ghostmask.engine import signals
from ghostmask.engine.data import Batch
from ghostmask.engine.errors import RunStopped
from ghostmask.engine.signals import Interrupted, RaisingSignals, StopSignals
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_a_signal_raises_where_nothing_is_at_stake_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="without --restart"), RaisingSignals():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_swallowed_interruption_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_S", 0.1)
    with pytest.raises(Interrupted):
        swallow_one()


def swallow_one() -> None:
    with RaisingSignals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:  # as a library might
            time.sleep(5)


def test_a_signal_that_the_loop_did_not_act_on_is_handed_on_after_it() -> None:
    with pytest.raises(Interrupted):
        end_a_loop_with_a_signal()


def end_a_loop_with_a_signal() -> None:
    with RaisingSignals(), StopSignals() as polled:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert polled.requested == signal.SIGUSR1


class SignalledInEvaluation(MemoryData):
    """Rank 1 gets SIGTERM in the middle of the first evaluation, and has fewer batches than rank 0."""

    def evaluate(self) -> Iterator[Batch]:
        batches = list(super().evaluate()) * 12
        for number, batch in enumerate(batches[: len(batches) - 9 * self.world.rank]):
            if number == 1 and self.world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def interrupted(world: World, folder: str) -> tuple[int, str, int]:
    config = configured(CONFIG, checkpoint={"every_steps": 0})
    run, saved = memory_run(world, Path(folder), config, SignalledInEvaluation(world))
    assert saved is None
    with pytest.raises(RunStopped) as stop:
        run.execute(None)
    run.close()
    _, saved = memory_run(world, Path(folder), config)
    assert saved is not None
    return stop.value.exit_code, str(stop.value), saved.step


def test_an_evaluation_is_left_by_all_ranks_with_the_last_step_saved(tmp_path: Path) -> None:
    outcomes = run_distributed(interrupted, 2, str(tmp_path))
    message = "stopped by a signal; saved at step 4; run the same command again, without --restart"
    assert outcomes == [(75, message, 4)] * 2
