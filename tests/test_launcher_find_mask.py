"""Does find-mask write a mask that a run can train with, bit for bit?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ghostmask.engine.errors import InputError
from ghostmask.launcher.cli import run_command
from ghostmask.masks.scoring.topk import kept_count


def mask_in(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    with safe_open(file, "pt") as content:
        return {n: content.get_tensor(n) for n in content.keys()}, json.loads(content.metadata()["ghostmask"])  # noqa: SIM118


def test_a_mask_file_read_back_with_method_file_is_the_same_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    data = (
        "data.dataset=synthetic", "data.num_train=32", "data.num_eval=8", f"data.root={tmp_path}", "data.batch_size=8",
        "train.threads=1", "finetune.epochs=0", f"run={tmp_path}/run",
    )  # fmt: skip
    assert run_command(["prepare", "digits_magnitude", *data]) == 0
    first, second = tmp_path / "run" / "mask.safetensors", tmp_path / "second.safetensors"
    assert run_command(["find-mask", "digits_magnitude", *data, "mask.method=snip", "mask.density=0.02"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(first)
    assert "ghostmask: mask: density 0.02" in err
    masks, meta = mask_in(first)
    total = sum(mask.numel() for mask in masks.values())
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == kept_count(0.02, total)
    assert (meta["method"], meta["config"]["mask"]["density"]) == ("snip", 0.02)  # type: ignore[index]
    arguments = ["mask.method=file", f"mask.path={first}", "mask.density=1", "--out", str(second)]
    assert run_command(["find-mask", "digits_magnitude", *data, *arguments]) == 0
    assert "ghostmask: mask: density 0.02" in capsys.readouterr().err
    again, _ = mask_in(second)
    assert masks.keys() == again.keys()
    assert all(torch.equal(masks[n], again[n]) for n in masks)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "digits_probmask",
            "mask.method = 'probmask': finds its mask by training: use ghostmask train;",
        ),
        ("digits_magnitude", "mask.path = '': name the trained network that mask.method=magnitude prunes"),
        ("cifar10_resnet32_snip --out mask.pt", "--out = 'mask.pt': give a file ending in .safetensors"),
    ],
)
def test_what_find_mask_cannot_do_is_said_before_anything_starts(arguments: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        run_command(["find-mask", *arguments.split()])
    assert str(caught.value).startswith(said)
