"""Does a search with our rule at the limits of s do no worse than the authors' dynamics, on the same batches and noise?

Both train a small network on the digits; only dL/ds differs. The authors' code has the equations' s (1 - s) in the
denominator, no gradient at exactly 0 and 1, and a start that leaves 1 by the rounding of its first bisection.
"""

from __future__ import annotations

from functools import cache
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import ghostmask
from ghostmask.data_pipelines.sources.digits import MEAN, STD, split_indices
from ghostmask.engine.sharding.reparametrization import Draw, State
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.kernels.noise import noise_key
from ghostmask.masks.kernels.relaxed_mask import EPS, relaxed_mask
from ghostmask.masks.relaxed import RelaxedMask, Search
from ghostmask.models.build import build_model
from ghostmask.models.config import ModelConfig

EPOCHS, BATCH, LR = 8, 64, 0.1
WORST = 1.1
"""The most that our loss may be of the authors': seeds 1 to 5 gave 0.88, 0.86, 1.00, 0.90 and 0.88. The former rule,
straight through at 0 and 1, gave 1.4 to 2.3, and clip factors of 0.39 to 0.57 in the place of 1.00."""


class Authors(RelaxedMask):
    """dL/ds = g w m (1 - m) / (tau s (1 - s)), and 0 where s is exactly 0 or 1."""

    def start(self, weight: Tensor, part: Slice) -> State:
        return super().start(weight, part) | {"probability": torch.full_like(weight, 1 - 5e-7)}

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        w, s = state["weight"], state["probability"]
        inside = s.clamp(EPS, 1 - EPS)  # what the mask is made of; written out, so that nothing of ours decides
        m, rest = relaxed_mask(inside, noise_key(draw.seed, draw.step, draw.sample), self.temperature, first=0)
        exact = gradient * w * m * rest / (self.temperature * inside * (1 - inside))
        return {"weight": gradient * m, "probability": exact.where((s > 0) & (s < 1), 0.0)}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """(images (N, 3, 8, 8), labels) that are trained on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    train, _ = split_indices(labels)
    images = (torch.from_numpy(np.round(pixels[train] * 255 / 16)).float() / 255 - MEAN) / STD
    return images.view(-1, 1, 8, 8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[train])


def search(form: type[RelaxedMask], seed: int, density: float = 0.02) -> tuple[float, float]:
    """(training loss of the last epoch, median of 1 / divisor after the first) of a search of EPOCHS epochs."""
    images, labels = digits()
    steps = len(labels) // BATCH
    schedules = Search(density, "global", 0.03, EPOCHS // 6, EPOCHS * 3 // 5, EPOCHS, steps, seed)
    net = build_model(ModelConfig(name="digits_resnet"), 10, (3, 8, 8), seed)
    optimizer = ghostmask.optimizer(
        net,
        lambda rule, lr: form(schedules, rule, 6e-2 / lr),
        lr=LR,
        momentum=0.9,
        weight_decay=5e-4,
        clip=3.0,
        seed=seed,
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    losses, factors = [], []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for chosen in order[: steps * BATCH].split(BATCH):
            loss = functional.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            losses.append(loss.item())
            factors.append(1 / float(optimizer.divisor))
    return mean(losses[-steps:]), median(factors[steps:])


def test_the_search_loss_is_not_above_the_authors_and_the_weights_are_not_throttled() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, factor = search(RelaxedMask, seed=1)
        theirs, _ = search(Authors, seed=1)
    finally:
        torch.set_num_threads(before)
    assert factor >= 0.9
    assert ours <= WORST * theirs
