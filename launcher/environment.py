"""What has to be set before DeepSpeed is imported and numba compiles?"""

from __future__ import annotations

import os
import sys

from ghostmask.engine.errors import LOADING, say
from ghostmask.engine.launch import read_launch


def prepare_environment(device: str) -> None:
    """Tell DeepSpeed its accelerator for train.device = auto, cpu or cuda; a value the user has set stays.

    DeepSpeed looks for CUDA alone: it would move a run with train.device=cpu to a GPU that is there, and where there is
    none it prints a warning on stdout, in front of what `ghostmask evaluate --json` prints. Imports torch, which takes
    seconds: that is said.
    """
    if "deepspeed" not in sys.modules and not sys.stderr.isatty():
        say_loading()
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        use_whole_vectors()


def say_loading() -> None:
    """On rank 0: what takes the first seconds. On a terminal it is said at once, in a log where settings are right."""
    if read_launch().rank == 0:
        say(LOADING)


def use_whole_vectors() -> None:
    """Let numba's kernels use AVX-512's whole registers; without it LLVM takes half of each on most processors.

    In numba's settings and not in NUMBA_CPU_FEATURES: processes on other machines would inherit what this one can do.
    """
    from llvmlite import binding
    from numba import config

    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # a processor that LLVM does not know
        return
    if features.get("avx512f") and vars(config)["CPU_FEATURES"] is None:
        vars(config)["CPU_FEATURES"] = f"{features.flatten()},-prefer-256-bit"
