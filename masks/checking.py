"""Is a mask, whenever it is decided, what it must be: equal on all ranks, of exactly as many weights, no layer empty?

Every method goes through here: its masks in the state by `report.DensityReport`, which `MaskMethod.enter` lays over
whatever trains under a mask, its whole masks by `MaskMethod.settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import World
from ghostmask.masks.settings import layer_saver

ODD = (0x632BE59BD9B4E019, 0x51ED270B9F7C1D2B)
"""Multipliers of the hash that weighs a weight's place."""


class MaskWatch:
    """Checks the masks of a run's method, and says which layers lost everything, once per change.

    settings: of the method, of which one may save layers; world: all ranks of the run.
    """

    def __init__(self, settings: Any, world: World) -> None:
        self.settings, self.world = settings, world
        self._lost: list[str] = []

    def check(self, part: Slice, mask: Tensor, due: Sequence[int] | None, say: Callable[[str], None]) -> list[int]:
        """Collective: how many weights a mask keeps of each layer; mask: (n,) bool, of this rank's slice.

        due: how many it must keep: (one number) in all, or of each layer; None: any number. Raises RuntimeError, on
        every rank, that names the layers of which ranks hold different masks, or another number than is due.
        """
        sums = part.world.all_reduce(fingerprints(part, mask))
        # Ranks of other noise groups, and at stage 0 all of them, hold the same slices: sums are equal, or one differs.
        limits = self.world.all_reduce(torch.stack([sums, -sums]), dist.ReduceOp.MAX)
        kept, equal = sums[:, 0].tolist(), (limits[0] == -limits[1]).all(1).tolist()
        _refuse([f"{name} ({n} weights here)" for name, n, ok in zip(part.names, kept, equal, strict=True) if not ok],
                "the masks differ between ranks")  # fmt: skip
        if due is not None and len(due) == 1:
            _refuse([f"{sum(kept)} weights"] if sum(kept) != due[0] else [], f"the mask keeps not {due[0]}, but")
        elif due is not None:
            wrong = [f"{name} {n} for {d}" for name, n, d in zip(part.names, kept, due, strict=True) if n != d]
            _refuse(wrong, "the mask keeps another number of weights than it must")
        self._tell([name for name, n in zip(part.names, kept, strict=True) if n == 0], len(kept), say)
        return kept

    def _tell(self, lost: list[str], layers: int, say: Callable[[str], None]) -> None:
        if lost != self._lost and lost:
            names = f"{len(lost)} of {layers} layers have no weight left: {', '.join(lost)}"
            say(f"warning: {names}; {layer_saver(partial(getattr, self.settings))}")
        self._lost = lost


def fingerprints(part: Slice, mask: Tensor) -> Tensor:
    """(layers, 2) int64, to be added up over the ranks: weights kept, and a sum in which the place of each counts."""
    sums = torch.zeros(len(part.layout.shapes), 2, dtype=torch.int64, device=mask.device)
    for s in part.segments:
        own = mask[s.start : s.start + s.numel]
        host = mask.device.type == "cpu"  # elsewhere nobody waits for where the few are
        places = own.nonzero().squeeze(1) if host else torch.arange(s.numel, device=mask.device)
        hashes = (places + (s.offset + 1)) * ODD[0]
        hashes = (hashes ^ (hashes >> 29)) * ODD[1]  # not linear: 1 and 4 are not 2 and 3
        sums[s.layer] += torch.stack([own.sum(), hashes.sum() if host else (hashes * own).sum()])
    return sums


def _refuse(wrong: list[str], what: str) -> None:
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RuntimeError(f"{what}: {', '.join(wrong[:5])}{more}; please report this as a bug")
