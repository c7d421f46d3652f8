"""What a command shows on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Sequence


def shown_on_a_terminal(command: Sequence[str], **env: str) -> tuple[int, str]:
    """(its exit code, all that it wrote on a terminal, standard output and error together), with these variables."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, **env}) as process:
        os.close(theirs)
        seen = b""
        try:
            while data := os.read(ours, 4096):
                seen += data
        except OSError:  # the other end is closed
            pass
        os.close(ours)
        return process.wait(), seen.decode()
