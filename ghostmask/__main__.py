"""`python -m ghostmask`: the command `ghostmask`, for torchrun and srun."""

from __future__ import annotations

import sys

from ghostmask.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
