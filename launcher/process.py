"""Is the process whole: open standard streams, and a working directory that is still there?"""

from __future__ import annotations

import io
import os
import sys

from ghostmask.engine.errors import InputError


def open_standard_streams() -> None:
    """Lead the standard streams that are closed (`ghostmask ... >&-`) to nowhere.

    Else the next file that is opened becomes standard output, and what libraries print there goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:  # as Python starts with a closed one
            mode = "r" if number == 0 else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error does by itself
        sys.stdout.reconfigure(errors="backslashreplace")


def require_working_directory() -> None:
    """Raise InputError where the working directory was removed: nothing relative to it can be found any more."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the working directory is not there any more; cd to one that is") from None
