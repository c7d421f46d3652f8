"""How does the process start and end: one line and an exit code for what the user or the cluster did."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence

from ghostmask.engine.errors import EXIT_INPUT, InputError, RunStopped
from ghostmask.launcher.cli import run_command

EXIT_CTRL_C = 130
EXIT_BROKEN_PIPE = 141
"""As a shell reports a process that SIGINT or SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `ghostmask` command (default: the process's own arguments) and return the exit code.

    0 done; 2 wrong input, said in one line; 3 and 75 see engine.errors; 130 after Ctrl-C. A defect is a traceback.
    """
    try:
        code = run_command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except InputError as error:
        _say(f"error: {error}")
        return EXIT_INPUT
    except RunStopped as stop:
        _say(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_CTRL_C
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _say(message: str) -> None:
    """One line on stderr, from one rank only: all ranks stop for the same reason."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ghostmask: {' '.join(message.splitlines())}", file=sys.stderr)


def _reader_is_gone() -> bool:
    """True where stdout is a pipe that nobody reads any more, as in `ghostmask show config | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
