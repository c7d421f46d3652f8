"""Do shift, flip and normalisation on the device do what one image at a time would get?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.augment import Normalisation, draws, shift_and_flip
from data_pipelines.order import sample_words
from data_pipelines.source import Augmentation


def _random_images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 7, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("augmentation", [Augmentation(pad=2, flip=True), Augmentation(pad=1), Augmentation(flip=True)])
def test_batched_shift_and_flip_equal_one_image_at_a_time(augmentation: Augmentation) -> None:
    images = _random_images(40)
    drawn = draws(sample_words(1, 2, np.arange(40)), augmentation)
    result = shift_and_flip(images, drawn, augmentation)
    p = augmentation.pad
    for k, (down, right, flip) in enumerate(drawn.T.tolist()):
        padded = np.pad(images[k].numpy(), ((p, p), (p, p), (0, 0)))
        expected = padded[down : down + 7, right : right + 9]
        np.testing.assert_array_equal(result[k].numpy(), expected[:, ::-1] if flip else expected)


def test_draws_cover_every_place_evenly() -> None:
    down, right, flip = draws(sample_words(0, 0, np.arange(81_000)), Augmentation(pad=4, flip=True)).numpy()
    cells = np.bincount(down * 9 + right, minlength=81)
    assert cells.shape == (81,)
    assert abs(cells - 1000).max() < 5.5 * 1000**0.5
    assert abs(flip.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(down, flip)[0, 1]) < 0.02


def test_no_flip_without_flip() -> None:
    assert draws(sample_words(0, 0, np.arange(1000)), Augmentation(pad=1))[2].sum() == 0


def test_normalisation_is_that_of_the_formula_in_channels_last() -> None:
    images = _random_images(5)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    result = Normalisation.of(mean, std, 9, torch.device("cpu"))(images)
    expected = (images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), atol=2e-6, rtol=1e-6)
    assert result.shape == (5, 3, 7, 9)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
