"""How does the host read a small tensor without waiting for what the device was given to do meanwhile?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readback:
    """The values of a tensor as they are now, copied to the host while the device goes on."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._done = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._done = done

    def values(self) -> list[float]:
        """All values; waits until the copy is there."""
        if self._done is not None:
            self._done.synchronize()
        return [float(value) for value in self._host.reshape(-1).tolist()]
