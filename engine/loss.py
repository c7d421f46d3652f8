"""The module that DeepSpeed trains: network and cross-entropy in one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from ghostmask.engine.precision import autocast


class LossModule(nn.Module):
    """(images, labels) -> (mean cross-entropy with label smoothing, number of correct predictions).

    model: images (N, 3, H, W) -> logits (N, num_classes). The loss is computed in float32.
    """

    def __init__(self, model: nn.Module, label_smoothing: float, precision: str, *, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.precision = precision
        # Kept out of the module tree: the compiled object holds the same parameters under other names.
        self._forward = (torch.compile(model, dynamic=False) if compiled else model,)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with record_function("forward"):
            with autocast(images.device, self.precision):
                logits = self._forward[0](images)
            logits = logits.float()
            loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()
