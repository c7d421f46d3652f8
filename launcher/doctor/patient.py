"""What the doctor's checks look at, and leave for those that come after: a run that is set up and never trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.data import DataPipeline
from ghostmask.engine.hooks import Hook
from ghostmask.engine.launch import Launch
from ghostmask.engine.trainer import Trainer
from ghostmask.engine.world import World
from ghostmask.launcher.config import RunConfig
from ghostmask.launcher.run import Run, Shares
from ghostmask.masks.method import MaskMethod


@dataclass
class Patient:
    """A run on this rank. scratch: a folder on the disk of its folder, removed at the end; place: where that
    lies; the rest is set by the check named beside it."""

    config: RunConfig
    launch: Launch
    world: World
    place: Path
    scratch: Path
    shares: Shares
    data: DataPipeline | None = None  # data
    method: MaskMethod | None = None  # network
    recipe: tuple[Hook, ...] = ()  # network
    run: Run | None = None  # step
    trainer: Trainer | None = None  # step
    store: CheckpointStore | None = None  # step
    step_s: float = 0.0  # step: seconds of one step of the whole batch
    passes: int = 1  # step: noise samples per part in it
    checkpoint_bytes: int = 0  # disk: of all ranks' files together
    save_s: float = 0.0  # checkpoint: seconds of one save

    def close(self) -> None:
        """Collective: give back what the checks opened."""
        if self.trainer is not None:
            self.trainer.close()
            if self.trainer.data is not self.data:
                self.trainer.data.close()
        if self.store is not None:
            self.store.close()
        if self.data is not None:
            self.data.close()
