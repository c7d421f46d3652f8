"""Is state that is whole on every rank trained the same on any number of ranks, and counted and saved once?"""

from __future__ import annotations

import pytest
import torch
from gated import batches, network
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from ghostmask.engine.batchnorm import PartStatistics
from ghostmask.engine.checkpoint.entries import checkpoint_entries
from ghostmask.engine.data import Parts
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Draw, Reparametrization, State
from ghostmask.engine.sharding.rules import Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.sharding.spans import Spans
from ghostmask.engine.sharding.zero import shard_model
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World


class Softened(Reparametrization):
    """theta = w gain(layer), with a whole state tensor "gain" of one value per layer."""

    whole = ("gain",)

    def start(self, weight: Tensor, part: Slice) -> State:
        return {"weight": weight, "gain": torch.ones(len(part.names))}

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        return state["weight"] * Spans.layers(part).spread(state["gain"])

    def gradients(self, gradient: Tensor, state: State, part: Slice, draw: Draw) -> State:
        layers = Spans.layers(part)
        own = layers.sums(gradient * state["weight"]).float()
        return {"weight": gradient * layers.spread(state["gain"]), "gain": own}


def with_whole_state(world: World, zero_stage: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    net, (images, labels) = network(), batches(1)[0]
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    for p in net.parameters():
        p.requires_grad_(p.ndim > 1)
    rule = Sgd(0.9, 0.01)
    group = ParameterGroup("soft", weights, Softened({"weight": rule, "gain": rule}, {"gain": 0.5}), 0.1)
    sharded = shard_model(net, [group], world, zero_stage=zero_stage, micro_batch=8, microsteps=1, clip=0.5)
    for _ in range(3):
        sharded.engine.backward(functional.cross_entropy(sharded.engine(images), labels))
        sharded.engine.step()
    state, part = sharded.optimizer.states[0], sharded.optimizer.slices[0]
    entries = checkpoint_entries(net, sharded.optimizer, PartStatistics(net, Parts()), ())
    kept = {n for n in entries if n.startswith("soft.gain")}
    assert kept == {"soft.gain", "soft.gain.momentum"}
    assert entries["soft.gain"] is state["gain"]
    norms = {n: float(v) for n, v in sharded.optimizer.norms.items()}
    return {**part.gathered(state["weight"]), "gain": state["gain"]}, norms


def test_state_that_is_whole_on_every_rank_is_trained_the_same_on_any_ranks_and_counted_once() -> None:
    ((values, norms),) = run_distributed(with_whole_state, 1, 1)
    reference = {n: p.detach().double().requires_grad_() for n, p in network().named_parameters()}
    gain = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([
        {"params": [reference["0.weight"], reference["2.weight"]], "lr": 0.1}, {"params": [gain], "lr": 0.05}
    ], momentum=0.9, weight_decay=0.01)  # fmt: skip
    images, labels = batches(1)[0]
    for _ in range(3):
        optimizer.zero_grad()
        made = reference | {"0.weight": reference["0.weight"] * gain[0], "2.weight": reference["2.weight"] * gain[1]}
        functional.cross_entropy(functional_call(network(), made, (images.double(),)), labels).backward()
        trained_ones = [reference["0.weight"], reference["2.weight"], gain]
        norm = torch.cat([p.grad.reshape(-1) for p in trained_ones if p.grad is not None]).norm()
        assert norms["soft.gain"] > 0
        last = float(gain.grad.norm()) if gain.grad is not None else 0.0
        for p in trained_ones:
            assert p.grad is not None
            p.grad /= max(1.0, float(norm) / 0.5)
        optimizer.step()
    assert norms["soft.gain"] == pytest.approx(last, rel=1e-5)
    assert values["gain"].tolist() == pytest.approx(gain.tolist(), rel=1e-6)
    assert torch.allclose(values["0.weight"].double(), reference["0.weight"], atol=1e-6)
    for ranks, stage in ((2, 0), (2, 1), (2, 2)):
        for found, others in run_distributed(with_whole_state, ranks, stage):
            assert all(torch.equal(found[n], values[n]) for n in values), (ranks, stage)
            assert others == pytest.approx(norms, rel=1e-12)
