"""Is ghostmask of use in somebody's own loop: the examples, any network, schedulers, saving and going on?"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v2, resnet18

import ghostmask
from ghostmask.engine.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def steps_of(
    net: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0, side: int = 32
) -> list[float]:
    """The losses of some steps on toy images."""
    losses = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, side, side, generator=generator)
        labels = torch.randint(4, (4,), generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def small() -> nn.Module:
    """A network with batch norm and 2,440 prunable weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["plain_loop.py", "own_deepspeed.py"])
def test_an_example_is_made_sparse_by_five_lines_and_runs(name: str, tmp_path: Path) -> None:
    source = (ROOT / "examples" / name).read_text()
    assert sum("  # sparse" in line for line in source.splitlines()) <= 5
    assert len(source.splitlines()) <= 50
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if "deepspeed" in name else []
    command = [sys.executable, *launch, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("558,448 of" if name == "plain_loop.py" else "219,488 of 2,194,880 weights left") in done.stdout


@pytest.mark.parametrize(
    "method", [ghostmask.probmask(0.1, 20, lr=0.05), ghostmask.gmp(0.1, 10, every=2)], ids=["probmask", "gmp"]
)
def test_after_eval_the_network_holds_exactly_the_density_and_after_train_what_it_had(
    method: Callable[..., object],
) -> None:
    net = small()
    optimizer = ghostmask.optimizer(net, method, lr=0.05)
    steps_of(net, optimizer, 10)
    before = copy.deepcopy(net.state_dict())
    optimizer.eval()
    weights = ghostmask.prunable_weights(net)
    kept, total = sum(int((w != 0).sum()) for w in weights.values()), sum(w.numel() for w in weights.values())
    masks = ghostmask.present_masks(optimizer)
    assert all(not w.detach()[~masks[n]].any() for n, w in weights.items())
    assert kept == sum(int(m.sum()) for m in masks.values())
    # ProbMask's density has begun to fall only; GMP's is there.
    assert total * 0.1 - 1 <= kept < total
    optimizer.train()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize(
    ("method", "granularity"), [("probmask", "2:4"), ("gmp", "2:4"), ("magnitude", "2:4"), ("magnitude", "kernel")]
)
def test_units_are_kept_whole_in_anybodys_loop(method: str, granularity: str) -> None:
    net, density = small(), 0.4 if granularity == "kernel" else 0.5
    if method == "magnitude":
        made = ghostmask.fixed(ghostmask.magnitude_masks(net, density, granularity=granularity))
    elif method == "gmp":
        made = ghostmask.gmp(density, 10, every=2, granularity=granularity)
    else:
        made = ghostmask.probmask(density, 10, lr=0.1, granularity=granularity)
    optimizer = ghostmask.optimizer(net, made, lr=0.05)
    steps_of(net, optimizer, 11)
    optimizer.eval()
    masks = ghostmask.present_masks(optimizer)
    for name, mask in masks.items():
        places = mask.reshape(*mask.shape[:2], -1)
        if granularity == "kernel":
            assert torch.equal(places.any(2), places.all(2))
        elif mask.shape[1] % 4 == 0:
            assert bool((places.view(len(mask), -1, 4, places.shape[2]).sum(2) == 2).all()), name
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert granularity != "kernel" or density * total - 9 < kept <= round(density * total)


def test_a_saved_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, ghostmask.ShardedOptimizer, torch.optim.lr_scheduler.LRScheduler]:
        net = small()
        optimizer = ghostmask.optimizer(net, ghostmask.probmask(0.1, 12, lr=0.05), lr=0.05, clip=1.0)
        return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)

    net, optimizer, schedule = fresh()
    whole = []
    for step in range(8):
        whole += steps_of(net, optimizer, 1, step)
        schedule.step()
        if step == 3:
            saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(saved, tmp_path / "saved.pt")
    net, optimizer, schedule = fresh()
    kept = torch.load(tmp_path / "saved.pt", weights_only=True)
    net.load_state_dict(kept["net"])
    optimizer.load_state_dict(kept["optimizer"])
    schedule.load_state_dict(kept["schedule"])
    rest = []
    for step in range(4, 8):
        rest += steps_of(net, optimizer, 1, step)
        schedule.step()
    assert rest == whole[4:]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)


def test_a_state_of_another_method_is_refused() -> None:
    saved = ghostmask.optimizer(small(), ghostmask.gmp(0.1, 10), lr=0.1).state_dict()
    other = ghostmask.optimizer(small(), ghostmask.probmask(0.1, 10), lr=0.1)
    with pytest.raises(ValueError, match="group prunable: the saved state is not that of"):
        other.load_state_dict(saved)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 4)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(images, 4).flatten(1)
        logits: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return logits


class Attending(nn.Module):
    """A vision transformer's block over 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.patches(images).flatten(2).transpose(1, 2)).mean(1))
        return logits


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (lambda: resnet18(num_classes=4).to(memory_format=torch.channels_last), 32),
        (lambda: mobilenet_v2(num_classes=4), 32),
        (Attending, 32),
        (Tied, 32),
    ],
    ids=["channels_last", "depthwise", "attention", "tied"],
)
def test_any_network_is_pruned_as_it_is(make: Callable[[], nn.Module], side: int) -> None:
    torch.manual_seed(0)
    net = make()
    names = list(net.state_dict())
    weights = ghostmask.prunable_weights(net)
    masks = ghostmask.magnitude_masks(net, 0.2)
    optimizer = ghostmask.optimizer(net, ghostmask.fixed(masks), lr=0.01)
    losses = steps_of(net, optimizer, 2, side=side)
    optimizer.eval()
    assert all(torch.isfinite(torch.tensor(losses)))
    total = sum(w.numel() for w in weights.values())
    assert sum(int(m.sum()) for m in masks.values()) == round(0.2 * total)
    assert all(torch.equal(w.detach() != 0, masks[n]) for n, w in weights.items())
    assert list(net.state_dict()) == names
    if isinstance(net, Tied):
        assert net.first.weight is net.second.weight
        assert "second.weight" not in masks
    if isinstance(net, Attending):
        assert any(name.endswith("in_proj_weight") for name in masks)


def test_patterns_say_what_is_pruned() -> None:
    net = small()
    optimizer = ghostmask.optimizer(net, ghostmask.gmp(0.5, 1, start_fraction=0, every=1), lr=0.1, exclude=["0.weight"])
    steps_of(net, optimizer, 1)
    optimizer.eval()
    assert bool((net[0].weight != 0).all())
    assert not bool((net[3].weight != 0).all())


def test_what_is_not_trained_is_neither_pruned_nor_decayed() -> None:
    net = small()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = ghostmask.optimizer(net, ghostmask.probmask(0.1, 4, lr=0.5), lr=0.1, weight_decay=0.1)
    steps_of(net, optimizer, 4)
    optimizer.eval()
    assert torch.equal(net[0].weight, before)
    assert (
        set(ghostmask.present_masks(optimizer)) == {"3.weight", "7.weight"} == set(ghostmask.magnitude_masks(net, 0.1))
    )
    with pytest.raises(InputError, match="requires_grad is False"):
        ghostmask.optimizer(net.requires_grad_(False), ghostmask.gmp(0.1, 10), lr=0.1)


def test_a_step_on_the_weights_of_evaluation_is_refused() -> None:
    net = small()
    optimizer = ghostmask.optimizer(net, ghostmask.probmask(0.1, 10), lr=0.1)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call the optimizer's train\(\) first"):
        optimizer.step()
    optimizer.train()
    steps_of(net, optimizer, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ghostmask.probmask(5, 10), r"mask.density = 5: "),
        (lambda: ghostmask.probmask(0.1, 10, constraint="layer"), r"mask.constraint = 'layer' is not known"),
        (lambda: ghostmask.gmp(0.1, 10, every=0), r"mask.update_every = 0: "),
        (lambda: ghostmask.gmp(0.1, 10, constraint="layer"), r"did you mean 'layerwise'"),
        (lambda: ghostmask.magnitude_masks(small(), 0.1, constraint="layer"), r"did you mean 'layerwise'"),
        (lambda: ghostmask.optimizer(small(), ghostmask.gmp(0.1, 10), lr=0.0), r"lr = 0.0: "),
        (lambda: ghostmask.magnitude_masks(small(), 0.1, granularity="channel"), r"granularity = 'channel': .*N:M"),
        (lambda: ghostmask.gmp(0.1, 10, granularity="kernel"), r"granularity = 'kernel': give weight or N:M"),
        (lambda: ghostmask.gmp(0.3, 10, granularity="2:4"), r"mask.density = 0.3: is not read with"),
        (lambda: ghostmask.optimizer(small(), ghostmask.fixed({}), lr=0.1), "there is no mask for 0.weight"),
        (
            lambda: ghostmask.optimizer(
                small(),
                ghostmask.fixed({n: m.float() for n, m in ghostmask.magnitude_masks(small(), 0.1).items()}),
                lr=1.0,
            ),
            r"give a bool tensor of shape \(8, 3, 3, 3\)",
        ),
        (lambda: given({"zero_optimization": {"stage": 3}}), "use stage 0, 1 or 2"),
        (lambda: given({"gradient_clipping": 1.0}), r"ghostmask.optimizer\(clip=...\) instead"),
        (lambda: given({"bf16": {"enabled": True}}), "weights are kept in float32"),
    ],
)
def test_what_would_be_ignored_or_fail_late_is_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def given(config: dict[str, Any]) -> object:
    net = small()
    return ghostmask.initialize(net, ghostmask.optimizer(net, ghostmask.gmp(0.1, 10), lr=0.1, place=False), config)
