#!/usr/bin/env bash
# Does the whole thing run here? Trains a small sparse network on 2 ranks from nothing to the exported file.
# Ranks: 2 on the CPU (gloo); with GPUs (NCCL) one per GPU, at most 2. RANKS=... overrides.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

if [ -z "${RANKS:-}" ]; then
    found=$(gpus)
    RANKS=$((found == 1 ? 1 : 2))
fi
cores_per_rank=$(($(nproc) / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores_per_rank > 0 ? cores_per_rank : 1))}
export PYTHONUNBUFFERED=1

config=configs/digits_probmask.yaml
run=runs/smoke # a run of its own: nobody's runs/digits_probmask is started over
torchrun=(torchrun --standalone --nproc_per_node="$RANKS" -m ghostmask train "$config" "run=$run" --restart)
echo "smoke: ghostmask prepare $config"
.venv/bin/python -m ghostmask prepare "$config"
echo "smoke: ${torchrun[*]}"
exec .venv/bin/python -m torch.distributed.run "${torchrun[@]:1}"
