"""Does the optimizer alone train parameters that are functions of its state as float64 and autograd say it should?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from gated import Gated, Reference, batches, groups, loss_of, network, trained
from torch import Tensor, nn

from ghostmask.engine.sharding.optimizer import Sampling, ShardedOptimizer
from ghostmask.engine.sharding.placement import ParameterGroup
from ghostmask.engine.sharding.reparametrization import Draw, Plain, Reparametrization, State
from ghostmask.engine.sharding.rules import Adam, Sgd
from ghostmask.engine.sharding.slices import Slice
from ghostmask.engine.world import single


@pytest.mark.parametrize("clip", [0.0, 0.2])
@pytest.mark.parametrize("samples", [(0,), (2, 5, 7)])
def test_a_plain_loop_trains_as_autograd_through_the_reparametrization_in_float64(
    clip: float, samples: tuple[int, ...]
) -> None:
    net, given = network(), batches(12)
    reference = Reference(copy.deepcopy(net), 3, samples, clip)
    optimizer = ShardedOptimizer(groups(net), clip=clip, sampling=Sampling(3, 40, samples))
    for number, batch in enumerate(given):
        trained(net, optimizer, [batch])
        reference.step(batch, 40 + number)
        assert float(optimizer.divisor) == pytest.approx(reference.divisors[-1], rel=1e-5)
    assert (max(reference.divisors) > 1.2) == (clip > 0), "the clipping was not tried"
    _, state, part = optimizer.group("gated")
    for name, value in part.gathered(state["weight"]).items():
        torch.testing.assert_close(value.double(), reference.weights[name].detach(), atol=2e-6, rtol=0)
    for name, value in part.gathered(state["gate"]).items():
        torch.testing.assert_close(value.double(), reference.gates[name].detach(), atol=2e-6, rtol=0)
    assert float(state["gate"].abs().max()) == pytest.approx(0.55), "the constraint never bound"
    wanted = reference.parameters(40 + len(given), samples[0])
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach().double(), wanted[name].detach(), atol=2e-6, rtol=0)


def test_schedules_and_constraints_see_the_number_of_the_update() -> None:
    net = network()
    form = Gated({"weight": Sgd(), "gate": Adam()})
    optimizer = ShardedOptimizer(groups(net, form), sampling=Sampling(samples=(0, 1)))
    trained(net, optimizer, batches(3))
    assert (optimizer.updates, form.updates, form.constrained) == (3, 3, [1, 2, 3])


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_eval_puts_the_delivered_weights_into_the_network_and_train_brings_the_others_back_bit_for_bit() -> None:
    net, given = network(), batches(6)
    optimizer = ShardedOptimizer(groups(net), sampling=Sampling(3))
    trained(net, optimizer, given[:3])
    before = values(net)
    optimizer.eval()
    optimizer.eval()
    group, state, part = optimizer.group("gated")
    delivered = part.gathered(group.reparametrization.evaluation_weights(state, part))
    assert not same({n: before[n] for n in delivered}, delivered)
    assert same({n: values(net)[n] for n in delivered}, delivered)
    optimizer.train()
    optimizer.train()
    assert same(values(net), before)
    trained(net, optimizer, given[3:])
    undisturbed = network()
    trained(undisturbed, ShardedOptimizer(groups(undisturbed), sampling=Sampling(3)), given)
    assert same(values(net), values(undisturbed))


class Halved(Plain):
    """Its own state while training, half of it when delivered."""

    differs_in_evaluation = True

    def evaluation_weights(self, state: State, part: Slice) -> Tensor:
        return state["weight"] / 2


def test_parameters_that_are_their_own_state_survive_an_evaluation_with_others() -> None:
    net = network()
    optimizer = ShardedOptimizer(groups(net, Halved({"weight": Sgd()})))
    before = values(net)
    optimizer.eval()
    assert all(torch.equal(p, before[n] / 2) for n, p in net.named_parameters() if p.ndim > 1)
    optimizer.train()
    assert same(values(net), before)


def test_a_saved_state_dict_goes_on_bit_for_bit() -> None:
    given, whole = batches(8), network()
    trained(whole, ShardedOptimizer(groups(whole), clip=0.5, sampling=Sampling(3)), given)
    first = network()
    optimizer = ShardedOptimizer(groups(first), clip=0.5, sampling=Sampling(3))
    optimizer.param_groups[0]["lr"] = 0.05
    trained(first, optimizer, given[:5])
    saved = copy.deepcopy(optimizer.state_dict())
    second = network()
    resumed = ShardedOptimizer(groups(second), clip=0.5, sampling=Sampling(3))
    resumed.load_state_dict(saved)
    assert same(values(second), values(first))
    assert resumed.param_groups[0]["lr"] == 0.05
    for net, going in ((first, optimizer), (second, resumed)):
        trained(net, going, given[5:])
    assert same(values(second), values(first))
    assert not same(values(second), values(whole)), "the learning rate made no difference"


def test_a_state_dict_goes_through_a_file(tmp_path: Any) -> None:
    net = network()
    optimizer = ShardedOptimizer(groups(net))
    trained(net, optimizer, batches(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = network()
    resumed = ShardedOptimizer(groups(other))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert same(values(other), values(net))


def without_gate(net: nn.Module) -> list[ParameterGroup]:
    return groups(net, Plain({"weight": Sgd()}))


def without_biases(net: nn.Module) -> list[ParameterGroup]:
    return groups(net)[:1]


def smaller(_: nn.Module) -> list[ParameterGroup]:
    return groups(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


@pytest.mark.parametrize("kind", [without_gate, without_biases, smaller])
def test_a_state_dict_of_something_else_is_refused_and_changes_nothing(
    kind: Callable[[nn.Module], list[ParameterGroup]],
) -> None:
    net = network()
    optimizer = ShardedOptimizer(groups(net))
    trained(net, optimizer, batches(2))
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    given = ShardedOptimizer(kind(network())).state_dict()
    with pytest.raises(ValueError, match=r"^group \w+: the saved state is not that of these parameters") as caught:
        optimizer.load_state_dict(given)
    assert "\n" not in str(caught.value)
    assert same(values(net), before)
    assert all(same(optimizer.state_dict()["state"][g], s) for g, s in state["state"].items())


def test_a_state_dict_with_more_groups_than_there_are_is_refused() -> None:
    net = network()
    with pytest.raises(ValueError, match="the saved state"):
        ShardedOptimizer(groups(net)[:1]).load_state_dict(ShardedOptimizer(groups(network())).state_dict())


def test_torchs_learning_rate_schedulers_move_the_rates() -> None:
    net, given = network(), batches(6)
    optimizer = ShardedOptimizer(groups(net), sampling=Sampling(3))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    by_hand = network()
    other = ShardedOptimizer(groups(by_hand), sampling=Sampling(3))
    for number, batch in enumerate(given):
        factor = (1 + torch.cos(torch.tensor(torch.pi * number / 6)).item()) / 2
        for settings, lr in zip(other.param_groups, (0.1, 0.02), strict=True):
            settings["lr"] = lr * factor
        for settings, expected in zip(optimizer.param_groups, other.param_groups, strict=True):
            assert settings["lr"] == pytest.approx(expected["lr"], rel=1e-5)
            expected["lr"] = settings["lr"]
        trained(net, optimizer, [batch])
        scheduler.step()
        trained(by_hand, other, [batch])
    assert same(values(net), values(by_hand))
    constant = network()
    trained(constant, ShardedOptimizer(groups(constant), sampling=Sampling(3)), given)
    assert not same(values(net), values(constant))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_update_with_a_gradient_that_is_not_finite_changes_no_state_and_says_so(bad: float, clip: float) -> None:
    net, given = network(), batches(3)
    optimizer = ShardedOptimizer(groups(net), clip=clip, sampling=Sampling(3))
    trained(net, optimizer, given[:2])
    assert float(optimizer.finite) == 1.0
    form = optimizer.groups[0].reparametrization
    state = copy.deepcopy(optimizer.state_dict()["state"])
    loss_of(net, given[2]).backward()
    (*_, bias) = net.parameters()
    bias.grad[1] = bad  # of the other group: the norm is joint
    optimizer.step()
    assert float(optimizer.finite) == 0.0
    assert (optimizer.updates, form.constrained) == (2, [1, 2])
    assert all(same(optimizer.state_dict()["state"][g], s) for g, s in state.items())


class Default(Reparametrization):
    """Three state tensors, one of which `weights` does not use."""

    def start(self, weight: Tensor, part: Slice) -> State:
        return {"weight": weight, "scale": weight.abs() + 1, "unused": torch.ones_like(weight)}

    def weights(self, state: State, part: Slice, draw: Draw) -> Tensor:
        return (state["weight"] * state["scale"]).tanh() + state["weight"] ** 3 * draw.step


def test_the_gradients_of_a_reparametrization_are_autograds_unless_it_brings_its_own() -> None:
    form = Default({"weight": Sgd(), "scale": Adam(), "unused": Adam()})
    generator = torch.Generator().manual_seed(0)
    part = Slice.even({"w": torch.zeros(200)}, single())
    gradient, weight = torch.randn(2, 200, generator=generator).unbind()
    state = form.start(weight, part)
    found = form.gradients(gradient.clone(), state, part, Draw(0, 2, 0))
    wide = {n: t.double().requires_grad_() for n, t in state.items()}
    values_ = form.weights(wide, part, Draw(0, 2, 0))
    wanted = torch.autograd.grad(values_, [wide["weight"], wide["scale"]], gradient.double())
    torch.testing.assert_close(found["weight"].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["scale"].double(), wanted[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["unused"], torch.zeros(200))
    assert not any(t.requires_grad for t in state.values())


def test_what_has_no_rule_is_not_trained() -> None:
    net = network()
    optimizer = ShardedOptimizer(groups(net, Gated({"gate": Adam()})))
    start = {n: t.clone() for n, t in optimizer.states[0].items()}
    trained(net, optimizer, batches(3))
    moved = {n for n, t in optimizer.states[0].items() if not torch.equal(t, start[n])}
    assert moved == {"gate", "gate.exp_avg", "gate.exp_avg_sq"}


def test_norms_are_those_of_the_states_gradients_by_group_and_name() -> None:
    net, (batch, *_) = network(), batches(1)
    reference = Reference(copy.deepcopy(net), 3, (0,), 0.0)
    optimizer = ShardedOptimizer(groups(net), clip=1e-3, sampling=Sampling(3))
    trained(net, optimizer, [batch])
    reference.step(batch, 0)
    wanted = {
        "gated.weight": torch.cat([w.grad.reshape(-1) for w in reference.weights.values()]).norm(),
        "gated.gate": torch.cat([g.grad.reshape(-1) for g in reference.gates.values()]).norm(),
        "other.weight": torch.cat([p.grad.reshape(-1) for p in reference.others.values()]).norm(),
    }
    assert {n: float(v) for n, v in optimizer.norms.items()} == pytest.approx(
        {n: float(v) for n, v in wanted.items()}, rel=1e-5
    )
    joint = sum(float(v) ** 2 for v in wanted.values()) ** 0.5
    assert float(optimizer.divisor) == pytest.approx(joint / 1e-3, rel=1e-5)


def test_scaling_multiplies_the_parameters_that_are_named() -> None:
    net = network()
    optimizer = ShardedOptimizer(without_gate(net))
    before = values(net)
    optimizer.scale({"0.weight": 2.0, "2.bias": 0.5})
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name] * {"0.weight": 2.0, "2.bias": 0.5}.get(name, 1.0)), name


def test_parameters_given_back_are_their_own_float32_tensors_with_the_delivered_values() -> None:
    net = network()
    optimizer = ShardedOptimizer(groups(net), sampling=Sampling(3))
    trained(net, optimizer, batches(3))
    optimizer.eval()
    delivered = values(net)
    optimizer.train()
    optimizer.give_back()
    assert same(values(net), delivered)
    addresses = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert len(addresses) == len(list(net.parameters()))
    assert all(p.grad is None and p.is_contiguous() for p in net.parameters())
    with torch.no_grad():
        optimizer.states[1]["weight"].zero_()
    assert same(values(net), delivered), "the optimizer still holds the parameters' memory"


def test_parameters_in_any_memory_order_train_alike() -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=layout)
        optimizer = ShardedOptimizer(groups(net), sampling=Sampling(3))
        for _ in range(3):
            images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
            loss_of(net, (images, torch.tensor([0, 1, 1, 0]))).backward()
            for p in net.parameters():
                p.grad = p.grad.contiguous(memory_format=layout if p.ndim == 4 else torch.contiguous_format)
            optimizer.step()
            optimizer.zero_grad()
        results.append(values(net))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=0, atol=1e-6)


def test_parameters_of_several_types_in_one_group_are_refused() -> None:
    net = network()
    net[0].weight.data = net[0].weight.data.bfloat16()
    with pytest.raises(ValueError, match=r"^group gated: its parameters are of several types or devices: "):
        ShardedOptimizer(groups(net))


def test_bfloat16_parameters_train_from_a_float32_state() -> None:
    net = network()
    wide = values(net)
    for p in net.parameters():
        p.data = p.data.bfloat16()
    optimizer = ShardedOptimizer(groups(net, Plain({"weight": Sgd(0.0)})))
    assert all(t.dtype == torch.float32 for s in optimizer.states for t in s.values())
    for batch in batches(3):
        loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    part = optimizer.slices[0]
    state = part.gathered(optimizer.states[0]["weight"])
    for name, p in net.named_parameters():
        assert p.dtype == torch.bfloat16
        if name in state:
            assert torch.equal(p, state[name].bfloat16())
            assert not torch.equal(state[name], state[name].bfloat16().float()), "the state was rounded"
            assert not torch.equal(state[name], wide[name])


def test_a_closure_computes_the_gradients_and_its_loss_is_returned() -> None:
    ours, theirs, (given,) = network(), network(), batches(1)
    optimizers = [ShardedOptimizer(groups(net), clip=1.0) for net in (ours, theirs)]

    def closure() -> Tensor:
        optimizers[0].zero_grad()
        loss = loss_of(ours, given)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = optimizers[0].step(closure)
    trained(theirs, optimizers[1], [given])
    assert loss.requires_grad
    assert optimizers[0].updates == 1
    assert same(values(ours), values(theirs))
