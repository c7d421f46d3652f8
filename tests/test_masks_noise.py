"""Is the noise Philox4x32-7, and does a weight's word depend on its key, tensor and index alone?"""

from __future__ import annotations

import itertools

import pytest
import torch

from ghostmask.masks.kernels.noise import NoiseKey, philox, random_words


def words(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    return [int(w) for w in philox((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))]


def test_philox_gives_the_published_words() -> None:
    """Known answers of the authors' Random123 library."""
    full = 0xFFFFFFFF
    assert words([0] * 4, [0, 0]) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words([full] * 4, [full, full]) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert words(pi[:4], pi[4:]) == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


def test_a_word_does_not_depend_on_how_the_tensor_is_cut() -> None:
    key = NoiseKey(1, 2, 3, 4).tensor()
    whole = random_words(key, 7, 0, 5000)
    assert torch.equal(torch.cat([random_words(key, 7, 0, 2048), random_words(key, 7, 2048, 2952)]), whole)
    assert torch.equal(random_words(key, 7, 0, 10), whole[:10])
    with pytest.raises(ValueError, match="multiple of 1024"):
        random_words(key, 7, 4, 10)


def test_every_part_of_the_key_changes_the_words() -> None:
    parts = list(itertools.product([0, 1, 2**40], [0, 1], [0, 1], [0, 1, 500]))
    keys = {int(NoiseKey(*part).tensor()) for part in parts}
    assert len(keys) == len(parts)
    assert NoiseKey(5, 6, 7, 8).tensor() == NoiseKey(5, 6, 7, 8).tensor()


def test_noise_is_uncorrelated_between_tensors_ranks_steps_and_samples() -> None:
    n = 200_000
    variants = [(NoiseKey(0, 0, 0, 0), 0), (NoiseKey(0, 0, 0, 0), 1), (NoiseKey(0, 0, 0, 1), 0)]
    variants += [(NoiseKey(0, 1, 0, 0), 0), (NoiseKey(0, 0, 1, 0), 0), (NoiseKey(1, 0, 0, 0), 0)]
    uniform = torch.stack([random_words(key.tensor(), number, 0, n) / 2**32 for key, number in variants])
    streams = torch.cat([uniform, uniform[:1].roll(1, 1), uniform[:1].roll(256, 1), uniform[:1].roll(1024, 1)])
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 4.5 / n**0.5  # 4.5 sigma, 36 pairs
