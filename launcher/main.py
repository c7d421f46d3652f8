"""How does the process start and end: one line and an exit code for what the user or the cluster did."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence

from ghostmask.engine.errors import EXIT_DEFECT, EXIT_INPUT, EXIT_INTERRUPTED, InputError, RunStopped, say
from ghostmask.engine.signals import Interrupted, RaisingSignals

EXIT_CTRL_C = 130
EXIT_BROKEN_PIPE = 141
"""As a shell reports a process that SIGINT or SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `ghostmask` command (default: the process's own arguments) and return the exit code.

    0 done; the others stand in docs/operations.md. A defect is a traceback. One of several ranks that fails tells the
    others, and its process ends here.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch prints C++ stacks of every broken connection
    with RaisingSignals() as signals:
        try:
            from ghostmask.launcher import cli  # under the signal handlers, as every import after it

            code = cli.run_command(sys.argv[1:] if argv is None else argv)
            _flush()
        except BaseException as error:
            signals.quiet()
            return _end(error, signals.requested)
    return code


def _flush() -> None:
    """Drop what could not be written of a run's progress (see `tell`): Python would try again, and end with 120."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _drop()


def _drop() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(error: BaseException, signal: int) -> int:
    """Say why the command ends, on one rank, and return its code. Raises a defect of one rank alone."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        _drop()
        return EXIT_BROKEN_PIPE
    try:
        _flush()
    except BrokenPipeError:  # what ended the command comes first
        _drop()
    code, text = _reason(error, signal)
    if _is_one_of_several():
        from ghostmask.launcher.last_words import end_together

        end_together(error, code, text)
    if code == EXIT_DEFECT:
        raise error
    say(text)
    return code


def _reason(error: BaseException, signal: int) -> tuple[int, str]:
    """Exit code and line. What a signal's exception was turned into on its way is that signal's doing."""
    if isinstance(error, InputError):
        return EXIT_INPUT, " ".join(f"error: {error}".splitlines())
    if isinstance(error, RunStopped):
        return error.exit_code, " ".join(str(error).splitlines())
    if isinstance(error, KeyboardInterrupt):
        return EXIT_CTRL_C, "interrupted"
    if isinstance(error, Interrupted) or signal:
        return EXIT_INTERRUPTED, str(error if isinstance(error, Interrupted) else Interrupted(signal))
    return EXIT_DEFECT, ""


def _is_one_of_several() -> bool:
    from ghostmask.engine.launch import read_launch

    try:
        return read_launch().size > 1
    except InputError:  # the environment itself is what is wrong
        return False


def _reader_is_gone() -> bool:
    """True where stdout is a pipe that nobody reads any more, as in `ghostmask show config | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
