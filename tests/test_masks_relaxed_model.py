"""Does a network under relaxed masks compile once, and compute in bfloat16 under autocast with float32 gradients?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ghostmask.masks.kernels.noise import NoiseKey
from ghostmask.masks.kernels.relaxed_mask import BUCKET, _buckets, relaxed_weights
from ghostmask.masks.masked_model import MaskedModel
from ghostmask.masks.relaxed_model import RelaxedMasks

NAMES = ("0.weight", "3.weight")


def masked_model() -> MaskedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return MaskedModel(net, NAMES, RelaxedMasks({n: net.get_parameter(n) for n in NAMES}, "global"))


def step(model: MaskedModel, run: nn.Module, number: int) -> torch.Tensor:
    """Logits of a training step with noise and temperature of its own; gradients are left in the parameters."""
    masks = model.sparsifier
    assert isinstance(masks, RelaxedMasks)
    masks.set_noise(NoiseKey(0, number, 0, 0))
    masks.set_temperature(1 - 0.2 * number)
    model.zero_grad()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    logits: torch.Tensor = run(images.contiguous(memory_format=torch.channels_last))
    logits.square().sum().backward()
    return logits.detach()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_network_is_compiled_once_and_equals_the_eager_one(precision: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = masked_model()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for number in range(3):
            ours = step(model, compiled, number)
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            assert torch.equal(ours, step(model, model, number))
            assert all(
                torch.allclose(a, p.grad, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
                for a, p in zip(gradients, model.parameters(), strict=True)
            )
            assert len(gradients) == 6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_under_autocast_masked_weights_are_bfloat16_and_gradients_float32() -> None:
    model = masked_model()
    weights = [model.net.get_parameter(n) for n in NAMES]
    with torch.autocast("cpu", torch.bfloat16):
        masked = model.sparsifier(weights)
        logits = step(model, model, 1)
    assert [m.dtype for m in masked] == [torch.bfloat16] * 2
    assert logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())


def test_bfloat16_and_channels_last_change_the_form_of_masked_weights_only() -> None:
    w, s = torch.randn(6, 5, 3, 3), torch.rand(6, 5, 3, 3)
    (plain,) = relaxed_weights([w], [s], NoiseKey(0, 0, 0, 0), 0.5)
    (last,) = relaxed_weights([w], [s], NoiseKey(0, 0, 0, 0), 0.5, channels_last=True)
    with torch.autocast("cpu", torch.bfloat16):
        (half,) = relaxed_weights([w], [s], NoiseKey(0, 0, 0, 0), 0.5)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)
    assert torch.equal(plain.bfloat16(), half)


def test_buckets_cover_all_tensors_in_order_and_are_full() -> None:
    sizes = [10, BUCKET, BUCKET // 2, BUCKET // 3, BUCKET // 3, 5]
    assert _buckets(sizes) == [(0, 2), (2, 5), (5, 6)]
    assert _buckets([1]) == [(0, 1)]
    assert _buckets([]) == []


def test_a_tensor_has_the_same_noise_in_any_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.ones(700), torch.ones(30, 50), torch.ones(9)]
    probabilities = [torch.full_like(t, 0.5) for t in tensors]
    whole = relaxed_weights(tensors, probabilities, NoiseKey(0, 0, 0, 0), 0.5)
    monkeypatch.setattr("ghostmask.masks.kernels.relaxed_mask.BUCKET", 1)
    apart = relaxed_weights(tensors, probabilities, NoiseKey(0, 0, 0, 0), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))
    assert not torch.equal(whole[0][:9], whole[2])
