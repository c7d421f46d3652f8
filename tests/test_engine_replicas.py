"""Who computes which parts with which noise, and who shares a state with whom, on any number of ranks and nodes?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from ghostmask.engine.data import Parts
from ghostmask.engine.errors import InputError
from ghostmask.engine.sharding.ranks import SMALLEST_PART, check_ranks, chosen_parts, fitting_ranks
from ghostmask.engine.sharding.replicas import Cycle, Replicas, share
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single


@dataclass(frozen=True)
class Seen:
    """What one rank was given: parts, its place among the ranks of its noise, and the world ranks beside it.

    members: the world's ranks of `inner` by their rank there; first: the first part of each of them, in `order`;
    across: the world's ranks that hold the same slices, in the order of their noise; forward: (part of the global
    batch, sample) of every forward pass.
    """

    parts: Parts
    members: list[int]
    first: list[int]
    across: list[int]
    forward: list[tuple[int, int]]


@cache
def everywhere(ranks: int, parts: int, noises: int, passes: int, nodes: str) -> list[Seen]:
    """What every rank was given; node: of each rank one letter."""
    return run_distributed(seen, ranks, parts, noises, passes, nodes)


def seen(world: World, parts: int, noises: int, passes: int, nodes: str) -> Seen:
    replicas = share(world, parts, noises, node=nodes[world.rank])
    inner, across = replicas.inner, replicas.across
    assert sorted(replicas.order) == list(range(inner.size))
    members = inner.all_gather(torch.tensor([world.rank])).reshape(-1).tolist()
    assert members[inner.rank] == world.rank
    firsts = inner.all_gather(torch.tensor([replicas.parts.first])).reshape(-1).tolist()
    beside = across.all_gather(torch.tensor([world.rank])).reshape(-1).tolist() if across else [world.rank]
    beside = [beside[rank] for rank in replicas.across_order]
    forward = [(replicas.parts.first + p, c.sample) for c in replicas.cycles(passes) for p in c.parts]
    return Seen(replicas.parts, members, [firsts[r] for r in replicas.order], beside, forward)


CASES = [
    # parts, noises, passes, ranks, node of each rank
    (4, 1, 1, 1, "a"),
    (4, 1, 2, 2, "aa"),
    (4, 2, 1, 1, "a"),
    (4, 2, 3, 2, "ab"),
    (4, 2, 1, 4, "aabb"),
    (4, 2, 2, 4, "abab"),
    (4, 4, 1, 2, "aa"),
    (4, 4, 1, 4, "abba"),
    (4, 4, 1, 4, "abab"),
    (8, 2, 1, 4, "abab"),
    (8, 1, 1, 4, "abab"),
    (6, 3, 1, 3, "aab"),
]


@pytest.mark.parametrize(("parts", "noises", "passes", "ranks", "nodes"), CASES)
def test_every_part_is_computed_once_per_pass_with_the_noise_that_belongs_to_it(
    parts: int, noises: int, passes: int, ranks: int, nodes: str
) -> None:
    everyone = everywhere(ranks, parts, noises, passes, nodes)
    forward = sorted(pair for s in everyone for pair in s.forward)
    wanted = [(p, p // (parts // noises) * passes + i) for p in range(parts) for i in range(passes)]
    assert forward == sorted(wanted), "a part was left out, done twice, or done with another part's noise"
    owned = [p for s in everyone for p in range(s.parts.first, s.parts.first + s.parts.count)]
    assert sorted(owned) == list(range(parts))
    for s in everyone:
        assert s.first == sorted(s.first), "the order is not that of the parts"
        samples = [sample for _, sample in s.forward]
        assert samples == sorted(samples), "the optimizer draws its samples in their order"


@pytest.mark.parametrize(("parts", "noises", "passes", "ranks", "nodes"), CASES)
def test_ranks_with_one_noise_share_a_state_that_the_others_hold_too(
    parts: int, noises: int, passes: int, ranks: int, nodes: str
) -> None:
    everyone = everywhere(ranks, parts, noises, passes, nodes)
    groups = min(noises, ranks)
    for rank, s in enumerate(everyone):
        assert len(s.members) == ranks // groups
        assert len(s.across) == groups
        assert set(s.members) & set(s.across) == {rank}
        for other in s.members:
            assert everyone[other].members == s.members
            if groups > 1:
                samples = {sample // passes for _, sample in s.forward}
                assert {sample // passes for _, sample in everyone[other].forward} == samples
        noises_across = [everyone[other].forward[0][1] for other in s.across]
        assert noises_across == sorted(noises_across), "summed in another order than on one rank"
        for other in s.across:
            assert everyone[other].members.index(other) == s.members.index(rank), "another slice of the state"
    assert len({tuple(s.members) for s in everyone}) == groups


@pytest.mark.parametrize(("nodes", "groups"), [("abab", [[0, 2], [1, 3]]), ("abba", [[0, 3], [1, 2]]),
                                               ("baab", [[0, 3], [1, 2]]), ("aabb", [[0, 1], [2, 3]])])  # fmt: skip
def test_groups_lie_within_a_node_however_the_launcher_placed_the_ranks(nodes: str, groups: list[list[int]]) -> None:
    everyone = everywhere(4, 4, 2, 1, nodes)
    assert [s.members for s in everyone] == [next(g for g in groups if rank in g) for rank in range(4)]
    assert everyone[groups[0][0]].parts.first == 0
    assert everyone[groups[1][0]].parts.first == 2


def test_cycles_by_hand() -> None:
    def of(parts: Parts, noises: int) -> Replicas:
        return Replicas(parts, noises, single(), (0,), None)

    assert of(Parts(8, 0, 8), 1).cycles(1) == [Cycle(0, tuple(range(8)))]
    assert of(Parts(8, 0, 8), 2).cycles(1) == [Cycle(0, (0, 1, 2, 3)), Cycle(1, (4, 5, 6, 7))]
    assert of(Parts(8, 4, 2), 2).cycles(3) == [Cycle(3, (0, 1)), Cycle(4, (0, 1)), Cycle(5, (0, 1))]
    assert of(Parts(8, 4, 4), 4).cycles(2) == [Cycle(4, (0, 1)), Cycle(5, (0, 1)), Cycle(6, (2, 3)), Cycle(7, (2, 3))]
    assert of(Parts(8, 5, 1), 8).cycles(1) == [Cycle(5, (0,))]


def test_ranks_that_do_not_fit_are_told_in_one_line_which_ones_do() -> None:
    with pytest.raises(InputError) as caught:
        check_ranks(8, 1, 3)
    assert str(caught.value) == "ranks = 3: do not fit train.replicas = 8; start 1, 2, 4, 8 ranks"
    with pytest.raises(InputError) as caught:
        check_ranks(12, 4, 3)
    assert str(caught.value) == "ranks = 3: do not fit train.replicas = 12 and mask.noises = 4; start 1, 2, 4, 12 ranks"
    with pytest.raises(InputError, match=r"^train\.replicas = 6: give a multiple of mask\.noises = 4$"):
        check_ranks(6, 4, 2)
    with pytest.raises(InputError, match=r"^ranks = 2: do not fit train\.replicas = 3; start 1, 3 ranks$"):
        check_ranks(3, 1, 2)


@pytest.mark.parametrize(("parts", "noises"), [(1, 1), (8, 1), (8, 2), (12, 4), (12, 6), (30, 5)])
def test_the_ranks_that_fit_are_those_that_share_parts_and_noises_evenly(parts: int, noises: int) -> None:
    for ranks in range(1, 2 * parts):
        even = parts % ranks == 0
        # Several ranks to one noise, or several noises to one rank; never a part of each.
        groups = {(r * parts // ranks) // (parts // noises) for r in range(ranks)}
        whole = len(groups) == min(noises, ranks) and (ranks % noises == 0 or noises % ranks == 0)
        assert (ranks in fitting_ranks(parts, noises)) == (even and whole), ranks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_number_of_parts_is_chosen_for_the_ranks_and_for_parts_that_fill_a_device(device: str) -> None:
    smallest = SMALLEST_PART[device]
    for batch, noises, ranks in [(24, 1, 2), (256, 1, 1), (256, 2, 4), (1024, 1, 8), (1000, 1, 1), (3072, 4, 12)]:
        chosen = chosen_parts(batch, noises, ranks, device)
        check_ranks(chosen, noises, ranks)
        assert batch % chosen == 0
        assert chosen == math.lcm(ranks, noises) or batch // chosen >= smallest, "parts smaller than they need be"
        assert batch % (2 * chosen) or batch // (2 * chosen) < smallest, "more numbers of ranks could go on with it"
    assert chosen_parts(256, 1, 1, "cpu") == 8
    assert chosen_parts(1024, 1, 2, "cuda") == 8
    assert chosen_parts(24, 1, 2, "cpu") == 2


def refused(world: World, parts: int, noises: int) -> str:
    with pytest.raises(InputError) as caught:
        share(world, parts, noises)
    return str(caught.value)


def test_sharing_out_refuses_a_number_of_ranks_on_every_rank() -> None:
    said: list[Any] = run_distributed(refused, 3, 4, 1)
    assert said == ["ranks = 3: do not fit train.replicas = 4; start 1, 2, 4 ranks"] * 3
