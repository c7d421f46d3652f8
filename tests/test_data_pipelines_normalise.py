"""Is a batch on the device what the formula of normalisation says, in channels_last order?"""

from __future__ import annotations

import torch

from ghostmask.data_pipelines.loading.normalise import Normalisation


def test_normalisation_is_that_of_the_formula_in_channels_last() -> None:
    images = torch.randint(0, 256, (5, 7, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    result = Normalisation.of(mean, std, 9, torch.device("cpu"))(images)
    expected = (images.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), atol=2e-6, rtol=1e-6)
    assert result.shape == (5, 3, 7, 9)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
