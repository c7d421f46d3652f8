"""Which examples stand below each help text? A test parses every one of them."""

from __future__ import annotations

EXAMPLES = {
    "": """examples:
  ghostmask prepare digits_probmask                             writes its images to data/beton/
  ghostmask train digits_probmask                               a small run for a first try
  torchrun --nproc-per-node 4 -m ghostmask train imagenet_resnet50_probmask data.root=/data/imagenet
  ghostmask evaluate digits_probmask --json
  ghostmask show config cifar10_resnet32_probmask mask.density=0.02""",
    "train": """examples:
  ghostmask train cifar10_resnet32_probmask                     starts, or goes on where it stopped
  ghostmask train cifar10_resnet32_probmask mask.density=0.02 run=density02
  ghostmask train my.yaml run=/scratch/me/first_try --restart
  torchrun --nproc-per-node 2 -m ghostmask train cifar10_resnet32_probmask train.zero_stage=2

exit codes: 0 done, 2 wrong input, 3 loss not finite, 75 interrupted after saving (run it again to go on)""",
    "evaluate": """examples:
  ghostmask evaluate cifar10_resnet32_probmask
  ghostmask evaluate /scratch/me/first_try --json
  ghostmask evaluate cifar10_resnet32_probmask data.root=/data/cifar10.1 --per-class classes.csv""",
    "export": """examples:
  ghostmask export cifar10_resnet32_probmask                    writes runs/cifar10_resnet32_probmask/export/
  ghostmask export cifar10_resnet32_probmask --format packed --values fp16 --coding entropy
  ghostmask export cifar10_resnet32_probmask --format onnx      writes its export/onnx/

formats: safetensors, packed, small, onnx, coreml, 2:4; docs/export.md""",
    "hessian": """examples:
  ghostmask hessian cifar10_resnet32_probmask                   writes runs/cifar10_resnet32_probmask/hessian/
  ghostmask hessian /scratch/me/first_try --top 1 --batches 16
  torchrun --nproc-per-node 4 -m ghostmask hessian imagenet_resnet50_probmask --top 1

Train with checkpoint.keep=1000 to have a checkpoint of every epoch to look at.""",
    "find-mask": """examples:
  ghostmask find-mask cifar10_resnet32_snip                     writes runs/cifar10_resnet32_snip/mask.safetensors
  ghostmask find-mask cifar10_resnet32_synflow mask.density=0.02 --out synflow02.safetensors
  ghostmask train cifar10_resnet32_file mask.path=synflow02.safetensors

methods: magnitude (with mask.path), random, snip, grasp, synflow, mlprune, file""",
    "prepare": """examples:
  ghostmask prepare cifar10_resnet32_probmask                   downloads CIFAR-10, writes data/beton/
  ghostmask prepare imagenet_resnet50_probmask data.root=/data/imagenet""",
    "init": """examples:
  ghostmask init /data/flowers                                  writes flowers.yaml
  ghostmask init /data/flowers --out configs/flowers.yaml""",
    "doctor": """examples:
  ghostmask doctor digits_probmask
  torchrun --nproc-per-node 4 -m ghostmask doctor imagenet_resnet50_probmask data.root=/data/imagenet
  srun ghostmask doctor imagenet_resnet50_probmask data.root=/data/imagenet

exit codes: 0 it would run (warnings or not), 2 a check failed""",
    "submit": """examples:
  ghostmask submit imagenet_resnet50_probmask --nodes 4 --gpus-per-node 8 --partition gpu --time 12:00:00
  ghostmask submit digits_probmask run=here --cluster local --tasks-per-node 2
  ghostmask submit cifar10_resnet32_probmask run=sweep --sweep mask.density=0.1,0.05,0.02 seed=0,1,2

A site's defaults: ~/.config/ghostmask/cluster.yaml, or the file that $GHOSTMASK_CLUSTER names; docs/cluster.md.""",
    "status": """examples:
  ghostmask status                                              all runs in runs/
  ghostmask status first /scratch/me/sweep --json""",
    "cancel": """examples:
  ghostmask cancel first""",
    "logs": """examples:
  ghostmask logs first --follow                                 of rank 0
  ghostmask logs first --rank 3""",
    "runs": """examples:
  ghostmask runs                                                all runs in runs/, the newest first
  ghostmask runs sweep --json""",
    "compare": """examples:
  ghostmask compare first second                                their curves go to compare.svg
  ghostmask compare sweep --out sweep.png""",
    "watch": """examples:
  ghostmask watch first                                         until it ends
  ghostmask watch /scratch/me/first_try --once""",
    "report": """examples:
  ghostmask report first                                        writes runs/first/report/report.html
  ghostmask report /archive/first_try --out first_try.html""",
    "table": """examples:
  ghostmask table sweep --csv sweep.csv                         the runs in runs/sweep/
  ghostmask table first second""",
    "bench": """examples:
  ghostmask bench mask                                          the mask operator against textbook code
  ghostmask bench step --json step.json
  ghostmask bench projection --device cuda --strict
  ghostmask bench export cifar10_resnet32_probmask              sizes and latencies of its network's formats

exit codes: 0 done, 1 with --strict where a bar is not met, 2 wrong input""",
    "sweep": """examples:
  ghostmask sweep digits_probmask digits_magnitude --vary mask.density=0.1,0.05 --seeds 3
  ghostmask sweep my.yaml train.epochs=20 --vary optim.lr=0.1,0.03 --vary mask.density=0.1,0.05""",
    "tost-table": """examples:
  ghostmask tost-table digits_tost train.epochs=10 --masks random,lth --densities 0.1,0.02 --seeds 3
  ghostmask tost-table digits_tost train.epochs=10 --masks random,lth --densities 0.1,0.02 --seeds 3 --print""",
    "find-density": """examples:
  ghostmask find-density cifar10_resnet32_l0 --target 0.05
  ghostmask find-density imagenet_resnet50_str --target 0.02 --ranks 4 --over mask.r_decay

exit codes: 0 found, 1 no run came near enough, 2 wrong input""",
    "methods-table": """examples:
  ghostmask methods-table digits_methods --jobs 2               every method, 4 densities, 3 seeds
  ghostmask methods-table digits_methods --methods probmask,lth --densities 0.05 --with lth:mask.round_fraction=0.5
  ghostmask methods-table digits_methods --print --csv methods.csv

A run that is finished is not run again; what failed is tried again.""",
    "completion": """examples:
  ghostmask completion bash > ~/.local/share/bash-completion/completions/ghostmask
  ghostmask completion zsh > ~/.zfunc/_ghostmask
  ghostmask completion fish > ~/.config/fish/completions/ghostmask.fish""",
    "show": """examples:
  ghostmask show configs
  ghostmask show methods
  ghostmask show methods lth                                    what it does, its paper, its settings
  ghostmask show config cifar10_resnet32_probmask mask.density=0.02""",
    "config": """examples:
  ghostmask show config                                         every setting, what it means, its default
  ghostmask show config cifar10_resnet32_probmask mask.density=0.02 > my.yaml""",
}
"""Command -> its examples, and what else is worth knowing; "" is `ghostmask` itself."""
