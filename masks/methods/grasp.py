"""grasp: the weights whose removal would hurt the gradient flow most stay, found before training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.one_shot import Scored
from ghostmask.masks.scoring.gradient_scores import ScoreLoss
from ghostmask.masks.scoring.score_images import chosen_images
from ghostmask.masks.scoring.scored_copy import draw_classifier
from ghostmask.masks.settings import FromTrained, Protecting, ScoringImages, number

TEMPERATURE = 200.0
"""T that the logits are divided by, as in the authors' code."""
SHARE = 3
"""A chunk is mask.score_batch / SHARE images, so that one setting bounds the memory of every finder (D36)."""


@dataclass(frozen=True)
class Settings(Protecting, FromTrained, ScoringImages):
    """grasp."""

    samples_per_class: int = number(0, 0)
    """Images of each class that are scored; 0 = the paper's 10, but 1 with more than 100 classes."""


class Grasp(Scored):
    """GraSP (Wang et al. 2020): the weights with the largest -w (H g) are removed; H and g of the loss at logits / T.

    Two passes over mask.samples_per_class images of every class, in chunks of mask.score_batch / SHARE: one for g over
    all of them, one for H g. Batch norm in batch-statistics mode, chunk by chunk: nothing else depends on the chunks.
    The copy that is scored gets a classifier drawn anew, as in the authors' code.
    """

    Settings = Settings
    blind_at_zero = True
    paper = (
        'Wang et al. 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow", '
        "https://arxiv.org/abs/2002.07376"
    )
    aliases = ("gradient_flow",)

    def scores(self, data: DataPipeline, part: Slice) -> Tensor:
        """Collective: w (H g) of this rank's slice, (n,), of the loss summed over the images: the largest -w (H g) are
        removed, so the largest w (H g) are kept."""
        each = self.settings.samples_per_class or default_per_class(data.num_classes)
        size = -(-self.settings.score_batch // SHARE)
        chunks = partial(chosen_images, data, each, size, self.world, per_class=True)
        loss = ScoreLoss(self.net, self.weights, chunks, self.world, "grasp", TEMPERATURE)
        draw_classifier(loss.twin, self.recipe.seed)
        gradient = [self.world.all_reduce(g) for g in loss.gradient()]
        product = part.summed(loss.hessian_product(gradient))
        return part.cut(loss.weights) * product


def default_per_class(num_classes: int) -> int:
    """Images of each class unless mask.samples_per_class says otherwise: 10; 1 with more than 100 classes (D37)."""
    return 10 if num_classes <= 100 else 1
