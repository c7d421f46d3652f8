"""Where does a run say by itself what went wrong? At the end of each phase."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ghostmask.engine.hooks import Hook
from ghostmask.launcher.looking.diagnosis import diagnosis
from ghostmask.launcher.looking.read import files

if TYPE_CHECKING:
    from ghostmask.engine.trainer import Trainer


class SaysDiagnosis(Hook):
    """Prints, on rank 0, the diagnosis of a phase that went to its end, from what the run has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_stop(self, trainer: Trainer) -> None:
        if trainer.world.is_main and trainer.position.step == trainer.phase.end_step:
            for text in diagnosis(files(self.folder), trainer.phase.name):
                trainer.reporter.progress.message(f"warning: {text}")
