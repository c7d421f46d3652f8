"""`python -m launcher`, with a checkout on the import path: the same command as `python -m ghostmask`."""

from __future__ import annotations

import sys

from ghostmask.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
