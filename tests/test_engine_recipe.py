"""Do the recipe options compute what their papers say: mixed images, distillation, LARS, ranks of five, mirrored
evaluation?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn import functional
from torchvision.transforms import v2

from ghostmask.data_pipelines.loading.normalise import Normalisation
from ghostmask.engine.config import OptimConfig
from ghostmask.engine.data import Batch, PartBatch
from ghostmask.engine.drawing import drawing
from ghostmask.engine.evaluation import hits, score
from ghostmask.engine.loss import Loss, LossModule
from ghostmask.engine.mixing import Mixing
from ghostmask.engine.randaugment import RandAugmenting
from ghostmask.engine.recipe import AugmentConfig
from ghostmask.engine.sharding.layerwise import exact_norms, sgd_of
from ghostmask.engine.sharding.rules import Scale, Sgd
from ghostmask.engine.sharding.slices import Layout, Slice
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single

CLASSES = 7


def some_batch(images: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    return torch.randn(images, 3, 8, 8, generator=generator), labels


def test_five_likeliest_are_those_of_a_sort_and_are_not_asked_for_with_five_classes() -> None:
    logits = torch.randn(500, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, labels = some_batch(500)
    order = logits.argsort(1, descending=True)
    wanted = [int((order[:, :k] == labels[:, None]).any(1).sum()) for k in (1, 5)]
    assert hits(logits, labels).tolist() == [*wanted, 500]
    assert 0 < wanted[0] < wanted[1] < 500
    few = hits(logits[:, :5], labels.clamp(max=4))
    assert few.tolist()[1:] == [0, 0]
    tied = hits(torch.zeros(CLASSES, CLASSES), torch.arange(CLASSES)).tolist()
    assert tied[1] >= tied[0]


def in_batches(images: Tensor, labels: Tensor) -> Iterator[Batch]:
    for part in torch.arange(len(labels)).split(16):
        yield Batch(images[part], labels[part])


def test_a_mirrored_evaluation_scores_the_mean_of_both_logits() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)).eval()
    images, labels = some_batch(50)
    wide = nn.Sequential(*net).double()
    with torch.no_grad():
        mean = (wide(images.double()) + wide(images.double().flip(3))) / 2
        net.float()
    wanted = functional.cross_entropy(mean, labels)
    found, plain = (score(net, in_batches(images, labels), single(), flip=flip) for flip in (True, False))
    assert found.loss == pytest.approx(float(wanted), abs=1e-6)
    assert found.accuracy == float((mean.argmax(1) == labels).double().mean())
    assert found.top5 == float((mean.topk(5).indices == labels[:, None]).any(1).double().mean())
    assert found.loss != pytest.approx(plain.loss, abs=1e-3)


def test_mixup_is_a_convex_combination_of_neighbours_and_of_their_labels() -> None:
    images, labels = some_batch()
    mixing = Mixing(AugmentConfig(mixup=0.4), CLASSES, seed=3)
    shares = []
    for step in range(300):
        mixed, soft = mixing.mixed(images, labels, step, 2)
        assert soft is not None
        own, other = images.double(), images.roll(1, 0).double()
        lam = float(((mixed.double() - other) * (own - other)).sum() / (own - other).square().sum())
        torch.testing.assert_close(mixed.double(), lam * own + (1 - lam) * other, atol=1e-6, rtol=0)
        hot = functional.one_hot(labels, CLASSES).double()
        torch.testing.assert_close(soft.double(), lam * hot + (1 - lam) * hot.roll(1, 0), atol=1e-5, rtol=0)
        shares.append(lam)
    assert abs(sum(shares) / 300 - 0.5) < 0.08  # Beta(0.4, 0.4): standard deviation 0.373 / sqrt(300) = 0.0215
    assert sum((s - 0.5) ** 2 for s in shares) / 300 == pytest.approx(0.25 / 1.8, rel=0.15)


def test_cutmix_puts_a_box_of_the_neighbour_into_the_image_and_its_area_into_the_targets() -> None:
    images, labels = some_batch()
    mixing = Mixing(AugmentConfig(cutmix=1.0), CLASSES, seed=3)
    boxes = 0
    for step in range(30):
        mixed, soft = mixing.mixed(images, labels, step, 0)
        assert soft is not None
        own = (mixed == images).all(1)
        assert torch.equal(mixed, torch.where(own[:, None], images, images.roll(1, 0)))
        assert all(torch.equal(own[0], rows) for rows in own)
        rows, columns = (~own[0]).nonzero().unbind(1)
        if len(rows):
            boxes += 1
            assert int((rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)) == len(rows), "no box"
        lam = float(own[0].double().mean())
        hot = functional.one_hot(labels, CLASSES).double()
        torch.testing.assert_close(soft.double(), lam * hot + (1 - lam) * hot.roll(1, 0), atol=1e-6, rtol=0)
    assert boxes > 20


def test_what_is_mixed_is_a_function_of_seed_step_and_part_and_leaves_the_generators_alone() -> None:
    images, labels = some_batch()
    config = AugmentConfig(mixup=0.2, cutmix=1.0, mix_fraction=0.5)
    before = torch.random.get_rng_state()
    made = {key: Mixing(config, CLASSES, key[0]).mixed(images, labels, *key[1:])[0]
            for key in [(s, t, p) for s in (1, 2) for t in range(40) for p in range(3)]}  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    for key in [(1, 7, 2), (2, 39, 0)]:
        assert torch.equal(Mixing(config, CLASSES, key[0]).mixed(images, labels, *key[1:])[0], made[key])
    plain = sum(torch.equal(m, images) for m in made.values())
    assert 85 < plain < 155, "half of 240 parts"
    boxed = sum(0 < int((m == images).sum()) < images.numel() for m in made.values())
    assert 30 < boxed < 90, "a quarter"


def test_randaugment_of_one_image_is_torchvisions_and_of_many_a_function_of_step_and_part() -> None:
    hook = RandAugmenting(AugmentConfig(randaugment=2, magnitude=9), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), seed=3)
    pixels = torch.randint(256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    before = torch.random.get_rng_state()
    found = hook.augmented(pixels, 5, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(hook.augmented(pixels, 5, 1), found)
    assert not torch.equal(hook.augmented(pixels, 5, 2), found)
    assert not torch.equal(hook.augmented(pixels, 6, 1), found)
    assert 20 < sum(not torch.equal(a, b) for a, b in zip(pixels, found, strict=True)) <= 40
    for step in range(20):
        with drawing(f"3 randaugment {step} 0"):
            wanted = pixels[:1]
            for _ in range(2):
                torch.randperm(1)
                wanted = v2.RandAugment(num_ops=1, magnitude=9)(wanted)
        assert torch.equal(hook.augmented(pixels[:1], step, 0), wanted)


def test_every_image_of_a_part_gets_each_operation_as_often_as_torchvision_gives_it() -> None:
    hook = RandAugmenting(AugmentConfig(randaugment=1), (0.5,) * 3, (0.2,) * 3, seed=3)
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    parts = [hook.augmented(ramp.expand(24, 3, 16, 16), step, 0) for step in range(40)]
    alike = [sum(torch.equal(part[0], other) for other in part[1:]) for part in parts]
    assert sum(alike) / len(alike) < 8, "the images of a part do not share their operations"
    found = {image.numpy().tobytes() for part in parts for image in part}
    torch.manual_seed(0)
    known = {v2.RandAugment(num_ops=1, magnitude=9)(ramp).numpy().tobytes() for _ in range(400)}
    assert found == known
    assert len(known) > 15


def test_an_image_that_randaugment_leaves_alone_keeps_its_bits() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    images = Normalisation.of(mean, std, 16, torch.device("cpu"))(pixels)
    hook = RandAugmenting(AugmentConfig(), mean, std, seed=0)
    step: Any = SimpleNamespace(position=SimpleNamespace(step=0))
    assert torch.equal(hook.on_part(step, 0, PartBatch(images, torch.zeros(1))).images, images)


def test_soft_targets_are_smoothed_as_labels_are() -> None:
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(4))
    soft = torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(5))
    soft /= soft.sum(1, keepdim=True)
    wanted = -((soft.double() * 0.7 + 0.3 / CLASSES) * logits.double().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Loss(0.3)(logits, soft, None).double(), wanted, atol=1e-6, rtol=0)


def test_the_distilled_loss_and_its_gradient_are_those_of_the_formula_in_float64() -> None:
    generator = torch.Generator().manual_seed(6)
    logits, teacher = (3 * torch.randn(5, CLASSES, generator=generator) for _ in range(2))
    _, labels = some_batch(5)
    wide = logits.double().requires_grad_()
    p, q = (torch.exp(x / 4) / torch.exp(x / 4).sum(1, keepdim=True) for x in (teacher.double(), wide))
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    hard = -(wide - wide.exp().sum(1, keepdim=True).log())[torch.arange(5), labels].mean()
    wanted = 0.3 * hard + 0.7 * 16 * divergence
    found = Loss(alpha=0.7, temperature=4.0)(logits.requires_grad_(), labels, teacher)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    for loss in (found, wanted):
        loss.backward()
    assert logits.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, atol=1e-6, rtol=0)


SHAPES = {"conv": torch.Size((4, 3, 3, 3)), "bias": torch.Size((5,)), "fc": torch.Size((7, 11)), "zero": (2, 3)}


def moved(world: World, lars: bool, divisor: float) -> dict[str, Tensor]:
    """Three updates of parameters of all kinds, cut over the ranks; a third of the weights is pruned."""
    shapes = {n: torch.Size(s) for n, s in SHAPES.items()}
    part = Slice(Layout(shapes, world.size, 50 if world.size > 1 else 0, 2), world)
    generator = torch.Generator().manual_seed(8)

    def drawn() -> dict[str, Tensor]:
        return {n: torch.randn(s, generator=generator) * (n != "zero") for n, s in shapes.items()}

    value, mask = part.cut(drawn()), part.cut(drawn()) < 0.4
    momentum = torch.zeros_like(value)
    rule = sgd_of(OptimConfig(lr=0.1, weight_decay=0.05, decay_norms=False, lars=lars, lars_trust=0.02))
    scale = Scale(torch.tensor(divisor), torch.zeros(()))
    for number in range(3):
        gradient = part.cut(drawn()) * mask
        left = rule.adapt(value, gradient, lambda: torch.where(mask, value, 0.0), part, scale)
        rule.update(value, gradient, [momentum], 0.1, number, left)
    return part.gathered(value)


def moved_by_hand(lars: bool, divisor: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)

    def drawn() -> dict[str, Tensor]:
        return {n: (torch.randn(s, generator=generator) * (n != "zero")).double() for n, s in SHAPES.items()}

    values, masks = drawn(), {n: t < 0.4 for n, t in drawn().items()}
    momenta = {n: torch.zeros_like(t) for n, t in values.items()}
    for _ in range(3):
        for name, drawn_gradient in drawn().items():
            w, g = values[name], drawn_gradient * masks[name] / divisor
            if w.dim() > 1:
                norm, seen = g.norm(), (w * masks[name]).norm()
                ratio = 0.02 * seen / (norm + 0.05 * seen) if lars and norm > 0 and seen > 0 else 1.0
                momenta[name] = 0.9 * momenta[name] + (g + 0.05 * w) * ratio
            else:
                momenta[name] = 0.9 * momenta[name] + g
            values[name] = w - 0.1 * momenta[name]
    return values


@pytest.mark.parametrize(("lars", "divisor"), [(False, 1.0), (True, 1.0), (True, 2.5)])
def test_decay_and_lars_by_parameter_are_the_formula_with_the_same_bits_on_any_ranks(
    lars: bool, divisor: float
) -> None:
    (alone,) = run_distributed(moved, 1, lars, divisor)
    wanted = moved_by_hand(lars, divisor)
    for name, value in alone.items():
        torch.testing.assert_close(value.double(), wanted[name], atol=1e-6, rtol=0)
    for ranks in (2, 3):
        for found in run_distributed(moved, ranks, lars, divisor):
            assert all(torch.equal(found[n], t) for n, t in alone.items()), ranks


def test_exact_norms_are_norms_to_ten_digits_whatever_the_size_of_the_values() -> None:
    shapes = {"a": torch.Size((300_000, 2)), "b": torch.Size((3,)), "c": torch.Size((4,))}
    part = Slice(Layout(shapes, 1), single())
    generator = torch.Generator().manual_seed(9)
    values = {n: torch.randn(s, generator=generator) * size
              for (n, s), size in zip(shapes.items(), (1e-20, 1e15, 0.0), strict=True)}  # fmt: skip
    (found,) = exact_norms(part, [part.cut(values)])
    wanted = torch.stack([v.double().norm() for v in values.values()])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert sgd_of(OptimConfig()) == Sgd(0.9, 5e-4), "nothing but plain SGD unless it is asked for"


class Watched(nn.Module):
    """Keeps what its convolution is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images: Tensor) -> Any:
        return self.conv(images).mean((2, 3))


def test_compile_is_torch_compile_of_the_network_and_keeps_its_names() -> None:
    net = Watched()
    eager, compiled = (LossModule(net, Loss(), "fp32", compiled=c) for c in (False, True))
    assert eager._forward[0] is net
    assert isinstance(compiled._forward[0], OptimizedModule)
    assert list(compiled.state_dict()) == list(eager.state_dict()) == ["model.conv.weight", "model.conv.bias"]
    assert math.isfinite(float(eager(*some_batch())[0].detach()))
