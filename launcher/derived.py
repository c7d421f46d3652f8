"""What do settings that are left to ghostmask come out as? Comments for `ghostmask show config`."""

from __future__ import annotations

from ghostmask.data_pipelines.open import count_train
from ghostmask.engine.errors import InputError
from ghostmask.launcher.config import RunConfig
from ghostmask.masks.schedules import DECIDING, LARGEST_RATE, PAPER_RATE, probability_rate


def derived(config: RunConfig) -> list[str]:
    """A comment for each setting whose value depends on what is not in the configuration."""
    given: float = getattr(config.mask, "lr", 0.0)
    if config.mask.method != "probmask" or given:
        return []
    try:
        images = count_train(config.data)
    except InputError:
        images = None
    steps = images // config.data.batch_size * config.train.epochs if images else 0
    if not steps:
        rule = f"{DECIDING:g} / steps of the search, at least {PAPER_RATE:g} and at most {LARGEST_RATE:g}"
        return [f"# mask.lr: 0 becomes {rule} (ghostmask prepare first, to see it here)"]
    return [f"# mask.lr: 0 becomes {probability_rate(steps):.4g}, in {steps:,} steps of the search"]
