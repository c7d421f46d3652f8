"""Does a packed file hold every bit of what it was made of, in the bytes that were promised?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_exports import network
from torch import Tensor

from ghostmask.engine.errors import InputError
from ghostmask.launcher.exporting.load_packed import load_packed
from ghostmask.launcher.exporting.packed import TYPES, gaps_of, pack


def round_trip(state: dict[str, Tensor], values: str, entropy: bool, folder: Path) -> int:
    """Pack, read again, compare bit by bit; returns the file's size."""
    content, _ = pack(state, values, entropy=entropy)
    (folder / "file").write_bytes(content)
    read = load_packed(str(folder / "file"))
    assert list(read) == list(state)
    for name, tensor in state.items():
        many = tensor.dim() >= 2 and tensor.dtype == torch.float32
        expected = tensor.to(TYPES[values]).float() if many else tensor
        assert read[name].shape == tuple(tensor.shape)
        assert read[name].dtype == expected.numpy().dtype
        assert read[name].tobytes() == expected.contiguous().numpy().tobytes(), name
    return len(content)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("values", ["float32", "bf16", "fp16"])
def test_every_bit_comes_back(values: str, entropy: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(20, 30, 3, 3, generator=generator)
    state = {
        "sparse": sparse.where(torch.rand(sparse.shape, generator=generator) < 0.02, 0.0),
        "half": torch.randn(7, 11, generator=generator).where(torch.rand(7, 11, generator=generator) < 0.5, 0.0),
        "dense": torch.randn(5, 13, generator=generator),
        "nothing": torch.zeros(3, 700),
        "signs": torch.tensor([[0.0, -0.0, 1.5, -0.0] * 8]),
        "dense signs": torch.tensor([[1.0, -0.0]]),
        "far": torch.zeros(1, 4000).index_fill(1, torch.tensor([0, 255, 511, 3999]), 2.0),
        "small": torch.full((2, 40), 1e-6).where(torch.rand(2, 40, generator=generator) < 0.2, 0.0),
        "empty": torch.zeros(0, 4),
        "bn.running_var": torch.rand(5, generator=generator) * 1e6,
        "bn.num_batches_tracked": torch.tensor(12345),
    }
    round_trip(state, values, entropy, tmp_path)


@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 0.3, 1.0])
def test_gaps_count_the_zeros_before_each_weight(density: float) -> None:
    kept = np.random.default_rng(0).random(5000) < density
    places, at = [], 0
    for byte in gaps_of(kept):
        at += int(byte)
        if byte != 255:
            places.append(at)
            at += 1
    assert places == np.flatnonzero(kept).tolist()


def test_resnet50_at_density_0_05_takes_less_than_6_and_4_megabytes_in_fp16(tmp_path: Path) -> None:
    net = network("resnet50", 1000, (3, 224, 224), 0.05)  # the same density everywhere: masks are largest so
    state = net.state_dict()
    sizes = {entropy: round_trip(state, "fp16", entropy, tmp_path) for entropy in (False, True)}
    assert sizes[False] < 4.5e6
    assert sizes[True] < 4e6
    kept = sum(int((w != 0).sum()) for w in state.values() if w.dim() > 1)
    rest = sum(w.nbytes for w in state.values() if w.dim() <= 1)
    bits = sum(-w.numel() * (0.05 * np.log2(0.05) + 0.95 * np.log2(0.95)) for w in state.values() if w.dim() > 1)
    assert sizes[True] < 1.02 * (bits / 8 + 2 * kept + rest), "masks near their entropy"


def test_a_weight_that_half_precision_does_not_have_is_refused() -> None:
    state = {"fc.weight": torch.tensor([[1e5, 0.0]])}
    with pytest.raises(InputError, match=r"--values = 'fp16': fc.weight holds larger numbers"):
        pack(state, "fp16", entropy=False)
    assert pack(state, "bf16", entropy=False)
