#!/usr/bin/env bash
# The first thing to run on a machine with a CUDA card, without network: exactness, cost of a step, the loader, a training.
#
#   tools/gpu_check.sh DIR [--cifar DATA_DIR] [--minutes 10]    # DATA_DIR/cifar10.npz, see hparams/cifar/cifar10_vit.yaml
#   tools/gpu_check.sh DIR --dry-run                            # the same commands on the CPU, at the smallest sizes
#
# Everything it writes is under DIR. Start it again to resume: stages that have finished are skipped. It ends with one
# Markdown table for docs/benchmarks.md. It uses the torch and timm that are installed (PYTHON=... chooses another).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" tools/gpu_check.py "$@"
