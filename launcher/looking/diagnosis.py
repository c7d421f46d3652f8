"""What went wrong in a run, in words: what did not decide, was not reached, was emptied, clipped or waited for?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from ghostmask.launcher.looking.read import Line, Seen, curve, is_number
from ghostmask.masks.schedules import DECIDED, FEW_DECIDED, suggested_rate
from ghostmask.masks.settings import layer_saver

SEARCH = "search"
REACHED = 1.02
"""A density or temperature that is so many times its target is taken for it."""
WAITED = 0.1
"""Share of the time in which steps waited for data, or for a save, that is worth a word."""
FEWEST = 4
"""Logged steps of a phase from which it is told how often gradients were clipped."""
FELL = 0.2
"""Share of its best accuracy that a run may lose without a word."""


def diagnosis(seen: Seen, only: str = "") -> list[str]:
    """Sentences, each with what to do, of all phases or of one that ends now; [] where nothing is to be said."""
    lines = [line for line in seen.lines if only in ("", line.get("phase"))]
    looks = [look for look in LOOKS if not only or look is not _emptied]  # the run has said that at once
    return [text for look in looks for text in look(lines, seen.settings, seen.summary)]


def not_looked_at(seen: Seen) -> list[str]:
    """What a run logged too little of to be told anything, each with the setting that logs more."""
    phases = [_of(seen.lines, phase) for phase in dict.fromkeys(line.get("phase") for line in seen.lines)]
    few = [len(curve(lines, "gradient/clip_factor")) < FEWEST for lines in phases]
    found = []
    if seen.settings.get("optim.clip") and any(few):
        found.append(f"clipping (fewer than {FEWEST} steps of a phase were logged: a smaller train.log_every)")
    if not curve(seen.lines, "speed/data_wait_fraction"):
        found.append("waiting for data (no step was logged: a smaller train.log_every)")
    return found


def _undecided(lines: Sequence[Line], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    """Probabilities that are neither 0 nor 1 at the end of a search: the mask that is cut from them is another network
    than the one that was trained."""
    search = _of(lines, SEARCH)
    decided = curve(search, "mask/decided_fraction")
    if not decided or decided[-1][1] >= FEW_DECIDED or not _is_over(search, settings):
        return
    rates = [rate for _, rate in curve(search, "lr/prunable.probability")]
    steps = search[-1]["step"]
    lr = settings.get("mask.lr") or max(rates, default=0.0)
    fix = f"; mask.lr = {lr:g} is too small for so few: try mask.lr={suggested_rate(lr, steps):.2g}" if lr else ""
    yield (
        f"only {decided[-1][1]:.0%} of the probabilities are within {DECIDED:g} of 0 or 1 after {steps} steps{fix}, or "
        "more train.epochs"
    )


def _not_reached(lines: Sequence[Line], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    search, target = _of(lines, SEARCH), settings.get("mask.temperature_end")
    temperature = curve(search, "mask/temperature")
    if temperature and is_number(target) and temperature[-1][1] > REACHED * target and _is_over(search, settings):
        yield (
            f"the temperature ended at {temperature[-1][1]:.3g}, above mask.temperature_end = {target:g}: the search "
            "was too short; give it more train.epochs"
        )
    flops = settings.get("mask.budget") == "flops"  # then a share of other things than mask/density is
    asked, density = None if flops else settings.get("mask.density"), curve(lines, "mask/density")
    if density and is_number(asked) and asked and density[-1][1] > REACHED * asked and _is_over(lines, settings):
        yield (
            f"the density ended at {density[-1][1]:.3g}, above mask.density = {asked:g}: its schedule did not end, or "
            "the method's settings decide it; look at the curve of mask/density"
        )


def _emptied(lines: Sequence[Line], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    empty = [layer.get("name") for layer in _layers(summary) if layer.get("kept") == 0]
    if not empty:
        last = next((line for line in reversed(lines) if any(key.startswith("density/") for key in line)), {})
        empty = [key.partition("/")[2] for key, value in last.items() if key.startswith("density/") and value == 0]
    if empty:
        fix = layer_saver(lambda name, default: settings.get(f"mask.{name}", default))
        yield f"{len(empty)} layers have no weight left: {', '.join(map(str, empty))}; {fix}"


def _clipped(lines: Sequence[Line], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    for phase in dict.fromkeys(line.get("phase") for line in lines):
        factors = [factor for _, factor in curve(_of(lines, phase), "gradient/clip_factor")]
        clipped = [factor for factor in factors if factor < 1]
        if len(factors) >= FEWEST and len(clipped) > len(factors) / 2:
            clip = settings.get("optim.clip")
            above = f" above optim.clip = {clip:g}" if is_number(clip) else ""
            yield (
                f"{phase}: gradients were clipped in {len(clipped) / len(factors):.0%} of the logged steps, to "
                f"{median(clipped):.2g} of their length: most have a norm{above}; a larger optim.clip, or a smaller "
                "optim.lr"
            )


def _waited(lines: Sequence[Line], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    for key, what, fix in (
        ("speed/data_wait_fraction", "steps waited for data", "more data.num_workers, smaller or raw images in the "
         ".beton, or a faster disk; ghostmask doctor measures the loader"),
        ("speed/checkpoint_stall_fraction", "steps waited for checkpoints", "a larger checkpoint.every_minutes, "
         "checkpoint.asynchronous=true, or a faster disk"),
    ):  # fmt: skip
        shares = [share for _, share in curve(lines, key)]
        newest = shares[len(shares) // 2 :]  # the first ones compile and fill caches
        if newest and fmean(newest) > WAITED:
            yield f"{what} for {fmean(newest):.0%} of the time: {fix}"


def _lost(lines: Sequence[Line], settings: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    bad = [line["step"] for line in lines if "train/loss" in line and line["train/loss"] is None]
    if bad:
        yield f"the training loss was not finite at step {bad[0]}; a smaller optim.lr, or optim.clip"
    scores = curve(lines, "eval/accuracy")
    if not scores:
        return
    at, best = max(scores, key=lambda point: point[1])
    step, now = scores[-1]
    if now < (1 - FELL) * best:
        yield (
            f"the accuracy fell from {best:.2%} at step {at} to {now:.2%} at step {step}: look at what the density, "
            "the temperature and the rates did between them"
        )


LOOKS = (_lost, _undecided, _not_reached, _emptied, _clipped, _waited)


def _of(lines: Sequence[Line], phase: object) -> list[Line]:
    return [line for line in lines if line.get("phase") == phase]


def _is_over(lines: Sequence[Line], settings: Mapping[str, Any]) -> bool:
    """Whether these lines go to the end of what they are of: of a search the epochs that it has, else of the run."""
    if not lines:
        return False
    if lines[-1].get("phase") == SEARCH:
        epoch, epochs = lines[-1].get("epoch"), settings.get("train.epochs")
        return not is_number(epoch) or not is_number(epochs) or int(epoch) + 1 >= epochs
    total = max((line.get("total_steps") or 0 for line in lines), default=0)
    return bool(lines[-1]["step"] >= total)


def _layers(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    layers = summary.get("layers")
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
