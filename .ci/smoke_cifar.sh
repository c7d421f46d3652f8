#!/usr/bin/env bash
# How good is a 95 % sparse network after a minute on one GPU? CIFAR-10, downloaded where there is a network.
#
# ROOT=... is the folder (data) that holds cifar-10-batches-py, or cifar-100-python, where nothing can be downloaded.
# Without a GPU a smaller network trains for one epoch, in under 5 minutes on two free cores. Settings may follow:
#   bash .ci/smoke_cifar.sh mask.density=0.02 run=runs/other
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ROOT=${ROOT:-data}
config=cifar10_resnet9_probmask
settings=("data.root=$ROOT" run=runs/smoke_cifar)
if [ ! -d "$ROOT/cifar-10-batches-py" ] && [ -d "$ROOT/cifar-100-python" ]; then
    settings+=(data.dataset=cifar100)
fi
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    settings+=(train.replicas=1) # one part: a small step of a GPU waits for its kernels to be launched
else
    echo "smoke-cifar: no GPU: one epoch of a small network on the CPU, with GMP, which needs few steps"
    config=cifar10_resnet32_gmp
    settings+=(model.name=digits_resnet data.batch_size=128 train.epochs=1 optim.warmup=40st mask.update_every=20
        train.log_every=50)
fi
for given in "$@"; do # goes before ours
    for place in "${!settings[@]}"; do
        [ "${settings[place]%%=*}" != "${given%%=*}" ] || unset "settings[place]"
    done
done
settings+=("$@")
echo "smoke-cifar: ghostmask prepare $config ${settings[*]}"
.venv/bin/python -m ghostmask prepare "$config" "${settings[@]}"
echo "smoke-cifar: ghostmask train $config ${settings[*]} --restart"
start=$(date +%s)
.venv/bin/python -m ghostmask train "$config" "${settings[@]}" --restart
echo "smoke-cifar: $(($(date +%s) - start)) s in all, imports included"
