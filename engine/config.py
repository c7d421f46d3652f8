"""The engine's own settings: optimizer, training loop, fine-tuning, checkpoints. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ghostmask.engine.errors import bad_value, unknown_name
from ghostmask.engine.position import Duration

SCHEDULES = ("cosine", "step", "constant")
LR_SCALES = ("none", "linear", "sqrt")
REFERENCE_BATCH = 256
"""Images of the batch that optim.lr is for where optim.scale_lr says so."""
PRECISIONS = ("fp32", "tf32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
LARGEST = 1e9
"""No number of a configuration is above it unless its own check says so (a seed)."""


def may_change(default: Any) -> Any:
    """A field that may differ when a run is resumed, because it does not change what the run computes."""
    return field(default=default, metadata={"may_change": True})


def require(ok: bool, name: str, value: object, fix: str) -> None:
    """Raise the InputError of `name` = `value` unless ok."""
    if not ok:
        raise bad_value(name, value, fix)


def require_number(name: str, value: float, low: float, high: float = LARGEST, *, above: bool = False) -> None:
    """Raise unless low <= value <= high (low < value with `above`); nan and inf never pass.

    Give `high` where less than LARGEST would already fill the memory, start too many threads or never end.
    """
    ok = (value > low if above else value >= low) and value <= high
    if high < LARGEST or value > high:
        require(ok, name, value, f"give a number in {'(' if above else '['}{low:g}, {high:g}]")
    require(ok, name, value, f"give a number {'above' if above else 'of at least'} {low:g}")


def path_field(default: str, *, changes: bool = False) -> Any:
    """A field that holds a path: ~ is the home folder in it, and what no file can be called is refused. changes: as
    may_change."""
    return field(default=default, metadata={"path": True, "may_change": changes})


@dataclass(frozen=True)
class OptimConfig:
    """SGD on the weights and the learning-rate schedule that every parameter group follows."""

    lr: float = 0.1
    """Peak learning rate of the weights."""
    momentum: float = 0.9
    """SGD momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on every weight, batch norm included; never on probabilities."""
    decay_norms: bool = True
    """false: no weight decay on batch norm and biases, that is on parameters of one dimension."""
    scale_lr: str = "none"
    """linear or sqrt: optim.lr and finetune.lr are those of a batch of 256 images, and are multiplied by
    data.batch_size / 256 (Goyal et al. 2017) or its square root; what comes out is said when the run starts."""
    lars: bool = False
    """LARS (You et al. 2017), for batches of 8,192 images and more: in every parameter of two or more dimensions the
    gradient with its weight decay is scaled to optim.lars_trust times the norm of the weights; others move as without
    it."""
    lars_trust: float = 1e-3
    """lars: how long a gradient becomes, in norms of its weights."""
    clip: float = 0.0
    """Largest joint norm of all gradients, dense weights and probabilities together; 0 = no clipping."""
    schedule: str = "cosine"
    """cosine (to 0), step (x gamma at each milestone) or constant, evaluated at every optimizer step."""
    warmup: str = "0ep"
    """Linear rise from 0 at the start of the main phase (of lth: of every round), such as 5ep or 500st."""
    milestones: tuple[int, ...] = ()
    """Epochs at which schedule=step multiplies the rate by gamma."""
    gamma: float = 0.1
    """Factor of schedule=step."""

    def __post_init__(self) -> None:
        require_number("optim.lr", self.lr, 0, above=True)
        require_number("optim.momentum", self.momentum, 0, 0.9999)
        require_number("optim.weight_decay", self.weight_decay, 0)
        require_number("optim.clip", self.clip, 0)
        require_number("optim.gamma", self.gamma, 0, 1, above=True)
        Duration.parse(self.warmup, "optim.warmup")
        require_number("optim.lars_trust", self.lars_trust, 0, above=True)
        if self.scale_lr not in LR_SCALES:
            raise unknown_name("optim.scale_lr", self.scale_lr, LR_SCALES)
        if self.schedule not in SCHEDULES:
            raise unknown_name("optim.schedule", self.schedule, SCHEDULES)
        require(not self.nesterov or self.momentum > 0, "optim.nesterov", self.nesterov, "needs optim.momentum above 0")
        require(
            list(self.milestones) == sorted(set(self.milestones)) and all(m > 0 for m in self.milestones),
            "optim.milestones", self.milestones, "give rising epochs above 0, such as [90, 135]",
        )  # fmt: skip
        require(
            self.schedule != "step" or bool(self.milestones),
            "optim.milestones", self.milestones, "schedule=step needs milestones, such as [90, 135]",
        )  # fmt: skip


@dataclass(frozen=True)
class FinetuneConfig:
    """The phase after a mask is fixed: the surviving weights go on training under it."""

    epochs: int = 20
    """Epochs of fine-tuning; 0 = none."""
    lr: float = 1e-3
    """Peak learning rate of the weights in this phase."""
    schedule: str = "constant"
    """cosine, or constant."""

    def __post_init__(self) -> None:
        require_number("finetune.epochs", self.epochs, 0, 1e6)
        require_number("finetune.lr", self.lr, 0, above=True)
        if self.schedule not in ("cosine", "constant"):
            raise unknown_name("finetune.schedule", self.schedule, ("cosine", "constant"))


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how a step is split and computed, what is logged."""

    epochs: int = 300
    """Epochs of the main phase (search for ProbMask); fine-tuning comes on top (finetune.epochs)."""
    zero_stage: int = may_change(1)
    """DeepSpeed ZeRO stage: 0 replicates; 1 shards dense weights, probabilities, optimizer state and what stays of the
    gradients; 2 the same (gradients of several parts are added up before they are sent, at every stage)."""
    precision: str = "fp32"
    """fp32; tf32 (products on GPUs rounded to TF32); bf16 (autocast; with train.zero_stage 1 or 2 the weights that the
    network sees and their gradients travel as bf16; dense weights, probabilities and optimizer state stay float32)."""
    replicas: int = 0
    """Parts that every global batch is cut into, each with its own batch-norm statistics; ranks share them evenly, and
    a run is the same run on any number of ranks that divides it. 0 = chosen when the run starts, and kept."""
    channels_last: bool = True
    """Convolutions in channels_last memory order."""
    compile: bool = False
    """torch.compile the network."""
    device: str = may_change("auto")
    """auto (CUDA where there is one), cpu or cuda."""
    threads: int = may_change(0)
    """torch threads per rank on the CPU; 0 = cores / ranks on this machine."""
    profile: bool = may_change(False)
    """Write a trace of three early steps of each phase to RUN/profile/, for TensorBoard or ui.perfetto.dev."""
    log_every: int = may_change(20)
    """Optimizer steps between lines of metrics.jsonl, TensorBoard scalars and progress."""
    eval_every: int = may_change(1)
    """Epochs between evaluations; the last epoch of a phase is always evaluated."""
    eval_flip: bool = False
    """Evaluation takes the mean of the logits of each image and its mirror image: accuracy and loss are of both."""
    timeout_minutes: float = may_change(10.0)
    """Minutes without progress after which several ranks end with code 77, the one that hangs having been named; six
    times that before a phase's first step and while data are opened, networks compiled or checkpoints written; 0 =
    hanging ranks are waited for."""

    def __post_init__(self) -> None:
        require_number("train.epochs", self.epochs, 0, 1e6)
        if self.zero_stage == 3:
            raise bad_value(
                "train.zero_stage", 3, "stage 3 shards the forward pass too, which masks do not support; use 0, 1 or 2"
            )
        require(self.zero_stage in (0, 1, 2), "train.zero_stage", self.zero_stage, "use 0, 1 or 2")
        if self.precision not in PRECISIONS:
            raise unknown_name("train.precision", self.precision, PRECISIONS)
        if self.device not in DEVICES:
            raise unknown_name("train.device", self.device, DEVICES)
        require_number("train.replicas", self.replicas, 0, 65_536)
        require_number("train.threads", self.threads, 0, 1024)
        require_number("train.log_every", self.log_every, 1)
        require_number("train.eval_every", self.eval_every, 1)
        require_number("train.timeout_minutes", self.timeout_minutes, 0, 1e6)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and how many saves are kept. A checkpoint is also written at the end of each epoch."""

    every_steps: int = may_change(0)
    """Optimizer steps between checkpoints; 0 = not by steps."""
    every_minutes: float = may_change(15.0)
    """Minutes between checkpoints; 0 = not by time."""
    every_epochs: int = may_change(1)
    """Epochs between checkpoints; the end of a phase is always saved."""
    keep: int = may_change(2)
    """Newest checkpoints that are kept."""
    asynchronous: bool = may_change(True)
    """Write in the background while training goes on."""
    takeover_s: float = may_change(60.0)
    """Seconds that this run's process may be silent (stopped, or cut off from the disk) before another one may take the
    run folder over. One of the same machine that has ended is noticed at once."""

    def __post_init__(self) -> None:
        require_number("checkpoint.takeover_s", self.takeover_s, 1)
        require_number("checkpoint.every_steps", self.every_steps, 0)
        require_number("checkpoint.every_minutes", self.every_minutes, 0)
        require_number("checkpoint.every_epochs", self.every_epochs, 1)
        require_number("checkpoint.keep", self.keep, 1)
