"""What do settings that are left to ghostmask come out as? Comments for `ghostmask show config`."""

from __future__ import annotations

from typing import Any

from ghostmask.data_pipelines.open import count_train
from ghostmask.engine.errors import InputError
from ghostmask.launcher.config import RunConfig


def derived(config: RunConfig) -> list[str]:
    """A comment for each setting whose value depends on what is not in the configuration."""
    mask: Any = config.mask
    if not hasattr(mask, "rate_rule") or mask.lr:
        return []
    try:
        images = count_train(config.data)
    except InputError:
        images = None
    steps = images // config.data.batch_size * config.train.epochs if images else 0
    if not steps:
        return [f"# mask.lr: 0 becomes {mask.rate_rule} (ghostmask prepare first, to see it here)"]
    return [f"# mask.lr: 0 becomes {mask.rate(steps):.4g}, in {steps:,} steps of the search"]
