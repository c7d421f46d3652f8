"""Which numbers of ranks can do a run, and into how many parts is its batch cut by itself? Imports no torch."""

from __future__ import annotations

import math

from ghostmask.engine.errors import InputError, bad_value

SMALLEST_PART = {"cpu": 32, "cuda": 128}
"""Images per part below which one device would be slowed down by doing several parts one after the other."""


def check_ranks(parts: int, noises: int, ranks: int) -> None:
    """Raise InputError unless `ranks` can share `parts` parts and `noises` noise groups evenly; names those that
    can."""
    if parts % noises:
        raise bad_value("train.replicas", parts, f"give a multiple of mask.noises = {noises}")
    fitting = fitting_ranks(parts, noises)
    if ranks not in fitting:
        listed = ", ".join(map(str, fitting))
        noise = f" and mask.noises = {noises}" if noises > 1 else ""
        raise InputError(f"ranks = {ranks}: do not fit train.replicas = {parts}{noise}; start {listed} ranks")


def fitting_ranks(parts: int, noises: int) -> list[int]:
    """The numbers of ranks that can do a run with so many parts and noise groups."""
    return [r for r in range(1, parts + 1) if parts % r == 0 and (r % noises == 0 or noises % r == 0)]


def most_ranks(parts: int, noises: int, ranks: int) -> int:
    """The most of `ranks` ranks that can do a run with so many parts and noise groups."""
    return max((r for r in fitting_ranks(parts, noises) if r <= ranks), default=ranks)


def chosen_parts(batch_size: int, noises: int, ranks: int, device: str) -> int:
    """V where train.replicas says nothing: as many parts as ranks and noise groups need, doubled while a part has
    SMALLEST_PART images and the batch divides; the more, the more numbers of ranks can go on with the run."""
    parts = math.lcm(ranks, noises)
    while batch_size % (2 * parts) == 0 and batch_size // (2 * parts) >= SMALLEST_PART[device]:
        parts *= 2
    return parts
