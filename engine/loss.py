"""The module that DeepSpeed trains: network and cross-entropy in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from ghostmask.engine.evaluation import hits
from ghostmask.engine.precision import autocast


@dataclass(frozen=True)
class Loss:
    """What is minimised: cross-entropy with label smoothing and, where there are a teacher's logits,

    (1 - alpha) of that + alpha T^2 KL(softmax(teacher / T) || softmax(logits / T))    (Hinton et al. 2015), means over
    the images.
    """

    label_smoothing: float = 0.0
    alpha: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        """() of float32 logits (N, K); targets: (N,) labels, or (N, K) rows that sum to 1."""
        loss = functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if teacher is None:
            return loss
        wanted, given = (functional.log_softmax(x / self.temperature, 1) for x in (teacher, logits))
        divergence = functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * loss + self.alpha * self.temperature**2 * divergence


class LossModule(nn.Module):
    """(images, labels, soft targets, teacher's logits), as in PartBatch -> (mean loss, `hits` of the labels).

    model: images (N, 3, H, W) -> logits (N, num_classes). The loss is computed in float32.
    """

    def __init__(self, model: nn.Module, loss: Loss, precision: str, *, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.precision = precision
        # Kept out of the module tree: the compiled object holds the same parameters under other names.
        self._forward = (torch.compile(model, dynamic=False) if compiled else model,)

    def forward(
        self, images: Tensor, labels: Tensor, soft: Tensor | None = None, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with record_function("forward"):
            with autocast(images.device, self.precision):
                logits = self._forward[0](images)
            logits = logits.float()
            loss = self.loss(logits, labels if soft is None else soft, teacher)
        return loss, hits(logits.detach(), labels)
