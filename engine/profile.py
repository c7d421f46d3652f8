"""Where does the time of a step go: a trace of a few steps, for TensorBoard or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule, tensorboard_trace_handler

from ghostmask.engine.hooks import Hook

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer

SKIPPED, WARM_UP, TRACED = 2, 1, 3
"""Steps of a phase (or of what a resume left of it) before the trace, and in it."""
BETWEEN_STEPS = "between steps: data, reports"


class ProfileSteps(Hook):
    """Writes folder/PHASE-rankR.*.pt.trace.json, once per phase, on every rank; a shorter phase gives no trace.

    Ranges in it: "forward" (engine.loss), "chain rule", "optimizer", "constraint" and "parameters"
    (engine.sharding.optimizer), BETWEEN_STEPS.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profile: profile | None = None
        self._between: record_function | None = None

    def on_start(self, trainer: Trainer) -> None:
        worker = f"{trainer.phase.name}-rank{trainer.world.rank}"
        self._profile = profile(
            activities=activities(),
            schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=TRACED, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(self.folder), worker),
            record_shapes=True,
        )
        self._profile.start()

    def on_step_start(self, trainer: Trainer) -> None:
        self._leave_between()

    def on_step_end(self, trainer: Trainer) -> None:
        if self._profile is None:
            return
        self._profile.step()
        if self._profile.step_num >= SKIPPED + WARM_UP + TRACED:
            self.on_stop(trainer)
            return
        self._between = record_function(BETWEEN_STEPS)
        self._between.__enter__()  # type: ignore[no-untyped-call]

    def on_stop(self, trainer: Trainer) -> None:
        self._leave_between()
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _leave_between(self) -> None:
        if self._between is not None:
            self._between.__exit__(None, None, None)
            self._between = None


def activities() -> list[ProfilerActivity]:
    """What can be traced here: the CPU, and the GPU where there is one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
