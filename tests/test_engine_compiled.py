"""What happens where kernels cannot be compiled, on one rank or on all, and how is work cut into ranges?"""

from __future__ import annotations

import importlib
import itertools
import warnings

import pytest
import torch

from ghostmask.engine import compiled
from ghostmask.engine.compiled import agree_on_kernels, kernels_on, load_kernels, pieces_in
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.masks.kernels import KERNELS

CPU = torch.device("cpu")


def broken() -> None:
    raise OSError("no compiler here")


def test_kernels_that_do_not_compile_are_one_warning_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", {})
    monkeypatch.setattr("ghostmask.masks.kernels.relaxed_mask_cpu.compile_all", broken)
    with pytest.warns(UserWarning, match=r"relaxed_mask_cpu could not be compiled, slower torch code is used.*here"):
        assert kernels_on(CPU, KERNELS[0]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels_on(CPU, KERNELS[0]) is None
        assert kernels_on(CPU, KERNELS[1]) is not None


def test_kernels_that_compile_are_agreed_on_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree_on_kernels(single(), KERNELS)
    assert all(kernels_on(CPU, name) is importlib.import_module(f"{name}_cpu") for name in KERNELS)


def agree(world: World, failing: int) -> tuple[list[str], bool]:
    """(warnings, whether the kernels are used) where those of one rank cannot be compiled."""
    if world.rank == failing:
        importlib.import_module("ghostmask.masks.kernels.projection_cpu").compile_all = broken  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agree_on_kernels(world, KERNELS)
        used = [load_kernels(f"{name}_cpu") is not None for name in KERNELS]
    assert len(set(used)) == 1
    return [str(w.message) for w in caught], used[0]


def test_where_one_rank_fails_all_ranks_use_torch_and_one_says_why() -> None:
    results = run_distributed(agree, 3, 2)
    assert [used for _, used in results] == [False] * 3
    assert [len(messages) for messages, _ in results] == [1, 0, 0]
    assert "rank 2, ghostmask.masks.kernels.projection_cpu: OSError('no compiler here')" in results[0][0][0]
    assert run_distributed(agree, 2, -1) == [([], True)] * 2


def test_ranges_cover_the_pieces_in_order() -> None:
    lengths = [3, 0, 5, 1]
    for edges in ([0, 9], [0, 2, 3, 4, 9], list(range(10))):
        found = [part for first, end in itertools.pairwise(edges) for part in pieces_in(lengths, first, end)]
        elements = [(number, i) for number, low, high in found for i in range(low, high)]
        assert elements == [(number, i) for number, length in enumerate(lengths) for i in range(length)]
