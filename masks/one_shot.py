"""One-shot finders: the mask is found before training, from a score of every weight, and stays as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ghostmask.engine.data import DataPipeline
from ghostmask.engine.position import Phase
from ghostmask.engine.sharding.reparametrization import Reparametrization
from ghostmask.engine.sharding.slices import Slice
from ghostmask.masks.mask_file import load_trained
from ghostmask.masks.masked import FixedMask
from ghostmask.masks.method import MaskMethod
from ghostmask.masks.scoring.topk import largest


class OneShot(MaskMethod):
    """Phase "train" under masks that `find` gives before its first step; a method is its `find`.

    The weights are the initialisation, or with mask.path a trained network's, and train for train.epochs. These are the
    methods that `ghostmask find-mask` knows.
    """

    @classmethod
    def check_find(cls, settings: Any) -> None:
        """Raise InputError where `ghostmask find-mask` would have nothing to find the mask from."""

    @abstractmethod
    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        """Collective: the masks, equal on every rank; the network, as `prepare` left it, stays exactly as it is."""

    def prepare(self) -> None:
        if self.settings.path:
            load_trained(self.net, self.settings.path)

    def begin(self, phase: Phase, data: DataPipeline, say: Callable[[str], None]) -> None:
        self.settle(self.find(data), say, self.counts())
        super().begin(phase, data, say)

    def reparametrization(self, phase: Phase) -> Reparametrization:
        return FixedMask(self.rule(), self.found or None, self.counts())


class Scored(OneShot):
    """A finder that scores every weight once and keeps the largest scores; a method is its `scores`."""

    @abstractmethod
    def scores(self, data: DataPipeline, part: Slice) -> Tensor:
        """Collective: the scores of this rank's slice, (n,); larger = kept. The network is left as it is."""

    def find(self, data: DataPipeline) -> dict[str, Tensor]:
        part = Slice.even(self.weights, self.world)
        return part.gathered(largest(part, self.scores(data, part), self.budget()))
