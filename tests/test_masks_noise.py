"""Is the noise Philox4x32-7, and does a weight's word depend on its key and its index in the network alone?"""

from __future__ import annotations

import itertools

import pytest
import torch

from ghostmask.masks.kernels.noise import BELOW_ONE, noise_key, philox, random_words, uniforms

KEY = noise_key(1, 2, 3)


def words(counter: list[int], key: tuple[int, int]) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    return [int(w) for w in philox((c0, c1, c2, c3), key)]


def test_philox_gives_the_published_words() -> None:
    """Known answers of the authors' Random123 library."""
    full = 0xFFFFFFFF
    assert words([0] * 4, (0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words([full] * 4, (full, full)) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, (0xA4093822, 0x299F31D0)) == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


@pytest.mark.parametrize("start", [0, 5 * 1024, 3 * 2**40 + 17])
def test_a_word_does_not_depend_on_how_the_network_is_cut(start: int) -> None:
    whole = random_words(KEY, start, 5000, "cpu")
    for first, count in ((0, 10), (4, 10), (1023, 2), (1024, 1), (700, 4300), (4999, 1), (5000, 0), (100, 0)):
        assert torch.equal(random_words(KEY, start + first, count, "cpu"), whole[first : first + count])


def test_words_lie_in_blocks_of_1024_and_the_whole_key_is_read() -> None:
    """The place that the kernels rely on, word by word."""
    key, first = (
        0xFEDCBA9876543210,
        2**32 * 1024 // 256 - 1024,
    )  # the last block before the counter's lower word is full
    found = random_words(key, first, 2048, "cpu").tolist()
    for i in (0, 255, 256, 1000, 1023, 1024, 1500):
        block, lane = divmod(first + i, 1024)
        counter = 256 * block + lane % 256
        place = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
        assert found[i] == words(place, (0x76543210, 0xFEDCBA98))[lane // 256]


def test_every_part_of_the_key_changes_it() -> None:
    parts = list(itertools.product([0, 1, 2**40], [-1, 0, 1], [0, 1, 500]))
    keys = {noise_key(*part) for part in parts}
    assert len(keys) == len(parts)
    assert all(0 <= key < 2**64 for key in keys)
    assert max(keys) >= 2**63  # unsigned
    assert noise_key(5, 6, 7) == noise_key(5, 6, 7)


def test_noise_is_uncorrelated_between_weights_steps_and_samples() -> None:
    n = 200_000
    keys = [noise_key(0, 0, 0), noise_key(0, 1, 0), noise_key(0, 0, 1), noise_key(1, 0, 0)]
    uniform = torch.stack([random_words(key, 0, n, "cpu") / 2**32 for key in keys])
    streams = torch.cat([uniform, *(uniform[:1].roll(shift, 1) for shift in (1, 256, 1024, 100_000))])
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 4.5 / n**0.5  # 4.5 sigma, 28 pairs


def test_uniforms_are_uniform_inside_0_and_1() -> None:
    """Kolmogorov-Smirnov, n = 1e6, and shares of Bernoulli draws down to probabilities of a few in a million."""
    n = 1_000_000
    u = uniforms(KEY, 123, n, "cpu")
    assert u.dtype == torch.float32
    assert 0 < u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    order, steps = u.double().sort().values, torch.arange(n + 1, dtype=torch.float64) / n
    assert torch.maximum((order - steps[:-1]).abs(), (order - steps[1:]).abs()).max() < 1.95 / n**0.5  # p = 0.001
    for s in (1e-5, 0.01, 0.5, 0.99, 1 - 1e-5):
        assert abs(int((u < s).sum()) - n * s) <= 4 * (n * s * (1 - s)) ** 0.5 + 1
    assert (u < 1.0).all()
    assert not (u < 0.0).any()


def test_uniforms_are_those_of_the_weights_words() -> None:
    words, u = random_words(KEY, 7, 10_000, "cpu"), uniforms(KEY, 7, 10_000, "cpu")
    assert torch.equal(u, uniforms(KEY, 0, 10_007, "cpu")[7:])
    assert ((u.double() - (words + 0.5) / 2**32).abs() <= 2.0**-24).all()
    assert torch.tensor(BELOW_ONE, dtype=torch.float32) < 1
