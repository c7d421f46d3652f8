"""How does one of several ranks end before its time: it tells the others, and one of them says it for all."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from typing import NoReturn

from torch.distributed import DistError

from ghostmask.engine.errors import EXIT_DEFECT, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_LOST, PeerFailed, say, tell
from ghostmask.engine.launch import read_launch
from ghostmask.engine.ranks import JOIN_S, Ranks, is_lost_contact, join

QUICK_JOIN_S = 10.0
"""For the store where a signal or a defect ends a rank before it has met the others: they may never come."""
SAVE_S = 600.0
"""For a save in the background, which is finished first."""
AGAIN = "run the same command again, without --restart"


def end_together(error: BaseException, code: int, text: str) -> NoReturn:
    """End this process with `code` because of `error`, or with the code of a peer whose end it is the consequence of.

    text: the line to say; a defect's is its traceback. Nothing that waits for peers is run down: they are elsewhere.
    """
    launch = read_launch()
    _end_without_answer(code if code != EXIT_DEFECT else EXIT_LOST)
    text = text or "".join(traceback.format_exception(error)).rstrip()
    try:
        ranks = join(launch, JOIN_S if code == EXIT_INPUT else QUICK_JOIN_S)
        code = _tell(ranks, error, code, text)
        _finish_saves()
        ranks.leave()
    except (DistError, RuntimeError):  # rank 0, or the machine that keeps the store, is gone
        if not is_lost_contact(error) and not isinstance(error, PeerFailed):
            _say(f"rank {launch.rank}", code, text)
        elif launch.rank == 1:
            _say("", code := EXIT_LOST, f"lost contact to the rank that keeps the ranks' store; {AGAIN}")
        else:
            code = EXIT_LOST
        _finish_saves()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at an interpreter's ordinary end NCCL would wait for the peers


def _end_without_answer(code: int) -> None:
    """The store's process may be stopped, and then answers nothing, ever."""
    timer = threading.Timer(JOIN_S + SAVE_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _tell(ranks: Ranks, error: BaseException, code: int, text: str) -> int:
    """The code that this rank ends with, after one rank has said why."""
    if isinstance(error, PeerFailed) or is_lost_contact(error):
        first = ranks.wait_for_code()
        if first is not None:
            ranks.follow()
            return first
        mine, who = ranks.lose()
        if mine:
            _say("", EXIT_LOST, f"lost contact to {who or 'a peer'}, which left no word; {AGAIN}")
            if not who:  # every rank is there: it is the connection's own error that counts
                tell(text, sys.stderr)
        return EXIT_LOST
    if code == EXIT_INTERRUPTED and (first := ranks.code()) not in (None, code):
        ranks.follow()  # a launcher that ends the ranks because one of them has failed
        return first if first is not None else code
    mine, whom = ranks.end(code, text)
    if mine:
        _say(whom, code, text)
    return code


def _say(whom: str, code: int, text: str) -> None:
    several = "\n" in text
    say(f"{whom}{':' if whom else ''}{chr(10) if several else ' ' if whom else ''}{text}")


def _finish_saves() -> None:
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(SAVE_S)
