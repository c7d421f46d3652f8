"""The whole thing as a user runs it: real processes, FFCV, two ranks under torchrun, a signal, another rank count."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ghostmask.launcher.settings import load_config

pytestmark = pytest.mark.timeout(900)

SMALL = ["train.epochs=3", "finetune.epochs=1", "train.log_every=5", "checkpoint.every_steps=7", "mask.density=0.1"]
ALONE = [sys.executable, "-m", "ghostmask"]


def on_ranks(size: int) -> list[str]:
    """`ghostmask` on that many ranks of this machine."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={size}",
        "-m",
        "ghostmask",
    ]


class UserRun:
    """A run folder, its data, and commands on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder / "run", folder / "data"

    def arguments(self, command: str, *more: str) -> list[str]:
        return [command, "digits_probmask", f"run={self.folder}", f"data.root={self.root}", *SMALL, *more]

    def metrics(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **options)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> UserRun:
    """A run on 2 ranks that was sent SIGTERM in its second epoch."""
    run = UserRun(tmp_path_factory.mktemp("user"))
    prepared = call([*ALONE, *run.arguments("prepare")])
    assert prepared.returncode == 0, prepared.stderr
    log = run.folder.parent / "train.log"
    with log.open("w") as output:
        process = subprocess.Popen([*on_ranks(2), *run.arguments("train")], stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 200
            while not any(line["step"] >= 25 for line in run.metrics()):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)  # torchrun hands it on to its ranks
            process.wait(timeout=120)
        finally:
            process.kill()
    assert "stopped by a signal; saved at step" in log.read_text(), log.read_text()
    return run


@pytest.fixture(scope="module")
def finished(interrupted: UserRun) -> UserRun:
    """The same run, finished on one rank."""
    log = (interrupted.folder.parent / "train.log").read_text()
    saved_at = re.search(r"saved at step (\d+)", log)
    result = call([*ALONE, *interrupted.arguments("train", "train.zero_stage=0")])
    assert result.returncode == 0, result.stderr
    assert saved_at is not None
    assert f"resuming {interrupted.folder} at step {saved_at.group(1)}, phase search" in result.stderr
    for row in (
        "weights kept",
        "density",
        "test accuracy",
        ", top-5 ",
        "images/s",
        "TensorBoard",
        "checkpoint",
        "exported model",
    ):
        assert row in result.stdout
    return interrupted


def test_metrics_of_an_interrupted_and_resumed_run_are_those_of_one_run(finished: UserRun) -> None:
    trained = [line for line in finished.metrics() if "train/loss" in line]
    steps = [line["step"] for line in trained]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4 * 22
    assert [line["phase"] for line in trained].index("finetune") == next(i for i, s in enumerate(steps) if s > 66)
    for name in ("mask/temperature", "mask/density_target", "mask/density", "mask/decided_fraction",
                 "lr/prunable.weight", "lr/prunable.probability", "lr/other.weight", "gradient/prunable.weight",
                 "gradient/prunable.probability", "gradient/other.weight", "gradient/clip_factor", "speed/images_per_s",
                 "speed/data_wait_fraction", "memory/peak_bytes"):  # fmt: skip
        assert name in trained[0], name
    assert "lr/prunable.probability" not in trained[-1]
    for where in ("train", "eval"):
        pairs = [(line[f"{where}/accuracy"], line[f"{where}/top5"]) for line in finished.metrics()
                 if f"{where}/accuracy" in line]  # fmt: skip
        assert len(pairs) >= 4
        assert all(0 <= top1 <= top5 <= 1 for top1, top5 in pairs)
        assert any(top1 < top5 for top1, top5 in pairs)


def test_tensorboard_holds_the_same_scalars_and_histograms(finished: UserRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    assert {"1_result/top5_eval", "1_result/top5_train"} <= set(events.Tags()["scalars"])
    logged = {e.step: e.value for e in events.Scalars("1_result/loss_train")}
    lines = {line["step"]: line["train/loss"] for line in finished.metrics() if "train/loss" in line}
    assert logged == pytest.approx(lines, rel=1e-5)
    assert sorted(events.Tags()["histograms"]) == ["density/of_layers", "probability/of_weights"]
    epochs = [line for line in finished.metrics() if any(key.startswith("probability/") for key in line)]
    assert {event.step for event in events.Histograms("probability/of_weights")} == {line["step"] for line in epochs}
    weights = json.loads((finished.folder / "export" / "summary.json").read_text())["prunable"]
    for line in epochs:
        assert sum(sum(counts) for key, counts in line.items() if key.startswith("probability/")) == weights
    assert not any(tag.startswith("density/") for tag in events.Tags()["scalars"])


def test_the_export_is_a_plain_state_dict_with_exactly_the_density(finished: UserRun) -> None:
    from ghostmask.models.cifar_resnet import digits_resnet

    tensors = load_file(finished.folder / "export" / "model.safetensors")
    digits_resnet(10, (3, 8, 8)).load_state_dict(tensors, strict=True)
    summary = json.loads((finished.folder / "export" / "summary.json").read_text())
    assert summary["kept"] == round(0.1 * summary["prunable"])
    assert sum(int((tensors[layer["name"]] != 0).sum()) for layer in summary["layers"]) == summary["kept"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluate_measures_the_exported_accuracy_afresh_on_any_number_of_ranks(ranks: int, finished: UserRun) -> None:
    assert load_config(str(finished.folder / "config.yaml")).train.replicas == 2, "chosen for 2 ranks of 32 images"
    start = ALONE if ranks == 1 else on_ranks(ranks)
    result = call([*start, "evaluate", str(finished.folder), "--json"])
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    summary = json.loads((finished.folder / "export" / "summary.json").read_text())
    told = {"network", "run", "data", "versions", "file"}  # of the run and its export
    assert set(measured) - {"num_images"} == set(summary) - told
    assert (measured["accuracy"], measured["top5"]) == (summary["accuracy"], summary["top5"])
    assert summary["accuracy"] <= summary["top5"] <= 1
    assert (measured["kept"], measured["density"]) == (summary["kept"], summary["density"])


def test_export_writes_the_same_network_again(finished: UserRun) -> None:
    file = finished.folder / "export" / "model.safetensors"
    before = load_file(file)
    file.unlink()
    result = call([*ALONE, "export", str(finished.folder)])
    assert result.returncode == 0, result.stderr
    after = load_file(file)
    assert all((before[name] == after[name]).all() for name in before)


def test_a_folder_with_another_configuration_is_refused_and_untouched(finished: UserRun) -> None:
    before = (finished.folder / "config.yaml").read_text()
    result = call([*ALONE, *finished.arguments("train", "optim.lr=0.2", "seed=9")])
    assert result.returncode == 2
    assert "optim.lr" in result.stderr
    assert "seed" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert (finished.folder / "config.yaml").read_text() == before


def test_a_number_of_ranks_that_does_not_fit_the_run_gets_those_that_do(finished: UserRun) -> None:
    before = (finished.folder / "config.yaml").read_text()
    result = call([*on_ranks(3), *finished.arguments("train", "--restart", "train.replicas=8")])
    assert "exitcode  : 2" in result.stderr
    assert result.stderr.count("ranks = 3: do not fit train.replicas = 8; start 1, 2, 4, 8 ranks") == 1
    result = call([*on_ranks(3), "export", str(finished.folder)])
    assert result.stderr.count("ranks = 3: do not fit train.replicas = 2; start 1, 2 ranks") == 1
    assert (finished.folder / "config.yaml").read_text() == before
