"""What has to be in the environment before DeepSpeed is imported?"""

from __future__ import annotations

import os


def prepare_environment(device: str) -> None:
    """Tell DeepSpeed its accelerator for train.device = auto, cpu or cuda; a value the user has set stays.

    DeepSpeed looks for CUDA alone: it would move a run with train.device=cpu to a GPU that is there, and where there is
    none it prints a warning on stdout, in front of what `ghostmask evaluate --json` prints. Imports torch.
    """
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
