#!/usr/bin/env bash
# Tests of the core, the engines and checkpoints, and a short training, with the oldest, a middle and the newest versions
# of Python, torch and timm; the oldest and the newest resume each other's checkpoint. Prints one Markdown table.
#
#   tools/check_versions.sh [DIR]        # environments and logs are kept in DIR (default output/versions)
#   ONLY="oldest newest" tools/check_versions.sh DIR
#
# Environments are made by uv where it is installed, otherwise by python3.10, python3.12 and python3.13 with pip. One that
# is there already is brought up to date. Needs about 8 GB per environment where pip installs torch with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(realpath -m "${1:-output/versions}")
mkdir -p "$place"
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD

core="tests/test_two_pass.py tests/test_sam.py tests/test_geometry.py tests/test_scope.py tests/test_contexts.py
  tests/test_registry.py tests/test_compat.py tests/test_two_pass_compile.py"
checkpoints="tests/trainer/test_checkpoint.py tests/trainer/test_resume.py"
small="-c quickstart --no-amp --epochs 2 --train-num-samples 1000 --val-num-samples 500 --lr 0.01 -j 0 --device cpu --overwrite"
rm -f "$place/failures"

# install NAME PYTHON PACKAGE...
install() {
  local env=$place/$1 python=$2
  shift 2
  set -- -r requirements.txt pytest pytest-xdist pytest-timeout "$@"
  if command -v uv >/dev/null; then
    [ -x "$env/bin/python" ] || uv venv --quiet --python "$python" "$env"
    uv pip install --quiet --python "$env/bin/python" "$@"
  else
    [ -x "$env/bin/python" ] || "python$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet "$@"
  fi
}

# run NAME LOG ARGUMENT...: python in the environment, its output in a log
run() {
  local name=$1 log=$place/$1-$2.log
  shift 2
  "$place/$name/bin/python" "$@" >"$log" 2>&1 || echo "failed: $log" | tee -a "$place/failures" >&2
  tail -1 "$log"
}

passed() { run "$1" "$2" -m pytest -n 2 --dist loadscope -p no:cacheprovider -k "not inductor" "${@:3}" | sed 's/ in .*//; s/=//g'; }

# loss NAME EXPERIMENT FLAG...: the training's final loss
loss() {
  run "$1" "$2" train.py $small --output "$place/runs" --experiment "$2" "${@:3}" |
    sed -n 's/.*"train_loss": \([0-9.]*\).*/\1/p' | cut -c1-7
}

declare -A versions=(
  [oldest]="3.10 torch==2.8.0 torchvision==0.23.0 timm==1.0.31"
  [middle]="3.12 torch==2.11.0 torchvision==0.26.0"
  [newest]="3.13 --upgrade"
)
declare -A tests trained resumed
names=${ONLY:-oldest middle newest}
for name in $names; do
  install $name ${versions[$name]}
  tests[$name]="$(passed $name core $core) | $(passed $name engines tests/engines) | $(passed $name checkpoints $checkpoints)"
  trained[$name]=$(loss $name "whole-$name")
done
for name in $names; do
  case $name in oldest) other=newest ;; *) other=oldest ;; esac
  state=$place/runs/whole-$other/checkpoint-0.pth.tar
  [ -n "${trained[$other]:-}" ] || continue
  loss=$(loss "$name" "resumed-$name" --resume "$state")
  resumed[$name]="$other: $loss"
  # Kernels round differently, which the second epoch amplifies; float32, measured: 0.005 %.
  awk "BEGIN { exit !(\"$loss\" != \"\" && ($loss - ${trained[$other]}) ^ 2 < (0.01 * ${trained[$other]}) ^ 2) }" ||
    echo "failed: $name resumed $other's state and ended at $loss, not ${trained[$other]}" | tee -a "$place/failures" >&2
done

echo "| | Python | torch | timm | core tests | engine tests | checkpoint tests | loss of 2 epochs | resumed after the first epoch of |"
echo "|---|---|---|---|---|---|---|---|---|"
for name in $names; do
  found=$("$place/$name/bin/python" -c "import platform, timm, torch
print(platform.python_version(), torch.__version__.split('+')[0], timm.__version__, sep=' | ')")
  echo "| $name | $found | ${tests[$name]} | ${trained[$name]} | ${resumed[$name]:-} |"
done
[ ! -e "$place/failures" ]
