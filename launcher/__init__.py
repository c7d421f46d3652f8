"""How a run starts: command line, configuration tree, wiring of the other packages."""

import sys

# `python -m launcher` in a checkout is the command itself (see __main__.py): runpy imports this package to find it.
if __name__ != "ghostmask.launcher" and not (sys.argv[0] == "-m" and {"launcher", "-mlauncher"} & {*sys.orig_argv}):
    raise ImportError(
        f"this package is imported as ghostmask.launcher, not as {__name__}: two names would be two copies of it"
    )
