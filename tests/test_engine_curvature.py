"""Are the eigenvalues those of the explicit Hessian, on 1 and on 2 ranks, and those of a run's checkpoints?"""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_data import MemoryData
from memory_run import CONFIG, complete, configured
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional

from ghostmask.engine.checkpoint.store import CheckpointStore
from ghostmask.engine.curvature import Curvature, top_eigenvalues
from ghostmask.engine.data import Batch
from ghostmask.engine.errors import InputError
from ghostmask.engine.spawn import run_distributed
from ghostmask.engine.world import World, single
from ghostmask.launcher.hessian import measure
from ghostmask.launcher.run import Shares
from ghostmask.models.config import TOST_PRESETS


def problem() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Batch]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 7), nn.Softplus(), nn.Linear(7, 3)).double()
    masks = {"0.weight": torch.rand(7, 6) < 0.5}
    point = {n: (p * masks[n] if n in masks else p).detach() for n, p in net.named_parameters()}
    images = torch.randn(23, 6, dtype=torch.float64)
    return net, point, masks, Batch(images, images[:, :3].argmax(1))


def explicit() -> Tensor:
    """Eigenvalues of the Hessian over the free parameters, descending."""
    net, point, masks, batch = problem()
    flat, sizes = torch.cat([p.reshape(-1) for p in point.values()]), [p.numel() for p in point.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = zip(point.items(), torch.split(vector, sizes), strict=True)
        logits = functional_call(net, {n: v.view_as(p) for (n, p), v in parts}, (batch.images,))
        return functional.cross_entropy(logits, batch.labels)

    free = torch.cat([masks[n].reshape(-1) if n in masks else p.reshape(-1) == p.reshape(-1) for n, p in point.items()])
    return torch.linalg.eigvalsh(hessian(loss)(flat)[free][:, free]).flip(0)


def found(world: World, top: int) -> list[float]:
    net, point, masks, batch = problem()
    mine = Batch(batch.images[world.rank :: world.size], batch.labels[world.rank :: world.size])
    parts = [Batch(mine.images[:4], mine.labels[:4]), Batch(mine.images[4:], mine.labels[4:])]
    curvature = Curvature(lambda p, x: functional_call(net, dict(p), (x,)), point, masks, parts, world)
    assert curvature.dimension == sum(int(masks[n].sum()) if n in masks else p.numel() for n, p in point.items())
    spectrum = top_eigenvalues(curvature.product, curvature.start(), top)
    assert spectrum.converged
    return spectrum.eigenvalues


def test_the_largest_eigenvalues_are_the_explicit_hessians() -> None:
    assert found(single(), 4) == pytest.approx(explicit()[:4].tolist(), rel=1e-5)
    assert found(single(), 1) == pytest.approx(explicit()[:1].tolist(), rel=1e-5)


def test_two_ranks_find_what_one_finds() -> None:
    ranks = run_distributed(found, 2, 3)
    assert ranks[0] == ranks[1]
    assert ranks[0] == pytest.approx(explicit()[:3].tolist(), rel=1e-5)


def test_lanczos_stops_where_the_subspace_is_exhausted() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, -5.0], dtype=torch.float64))
    spectrum = top_eigenvalues(lambda v: matrix @ v, torch.full((3,), 3**-0.5, dtype=torch.float64), 5)
    assert spectrum.eigenvalues == pytest.approx([3.0, 1.0, -5.0])
    assert (spectrum.products, spectrum.converged) == (3, True)
    spectrum = top_eigenvalues(lambda v: matrix @ v, torch.full((3,), 3**-0.5, dtype=torch.float64), 1, most=2)
    assert not spectrum.converged


def measured(world: World, folder: str, config: Any) -> tuple[list[tuple[int, list[float], bool]], str]:
    """(step, eigenvalues, converged) of each checkpoint, and what was printed."""
    with redirect_stdout(StringIO()) as printed:
        shares = Shares.of(config, world)
        data = MemoryData(world, parts=shares.plain.parts)
        spectra = measure(Path(folder), Path(folder) / "hessian", config, world, data, shares, top=2, num_batches=1)
    return [(step, s.eigenvalues, s.converged) for step, s in spectra], printed.getvalue()


def test_eigenvalues_along_the_checkpoints_of_a_run_are_written(tmp_path: Path) -> None:
    tost = {**TOST_PRESETS["all"], "lrsi_steps": 2, "ghost_skip_fraction": 0.8}
    config = configured(
        CONFIG, model={"name": "digits_resnet"}, mask={"method": "probmask"}, checkpoint={"keep": 2},
        finetune={"epochs": 0}, tost=tost,
    )  # fmt: skip
    run_distributed(complete, 2, str(tmp_path), config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (both, printed), (_, silent) = run_distributed(measured, 2, str(tmp_path), config)
    assert printed.startswith("2 checkpoints are left of this run (checkpoint.keep = 2): 9, 12\nstep 9  search")
    assert silent == ""
    assert [step for step, _, _ in both] == [9, 12]
    assert all(values == sorted(values, reverse=True) and values[0] > 0 and ok for _, values, ok in both)
    lines = [json.loads(line) for line in (tmp_path / "hessian" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["hessian/eigenvalue_1"]) for line in lines] == [(s, v[0]) for s, v, _ in both]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    events = EventAccumulator(str(tmp_path / "hessian"))
    events.Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("hessian/eigenvalue_1")]
    assert drawn == [(s, pytest.approx(v[0])) for s, v, _ in both]
    alone, _ = run_distributed(measured, 1, str(tmp_path), config)[0]
    for (_, one, _), (_, two, _) in zip(alone, both, strict=True):
        assert one == pytest.approx(two, rel=2e-2)


def no_checkpoint(world: World, folder: str) -> str:
    CheckpointStore(Path(folder) / "checkpoints", world).close()
    with pytest.raises(InputError) as caught:
        measure(
            Path(folder), Path(folder) / "hessian", CONFIG, world, MemoryData(world), Shares.of(CONFIG, world), top=1,
            num_batches=1,
        )  # fmt: skip
    return str(caught.value)


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    assert "it holds no checkpoint" in run_distributed(no_checkpoint, 1, str(tmp_path))[0]
