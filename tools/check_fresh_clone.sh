#!/usr/bin/env bash
# The first steps of a new user: clone into an empty directory, run `make train` and `make test`, then every runnable command
# of README and docs, scaled down (tools/runnable.py). Prints the seconds of each and stops at the first failure.
#
#   tools/check_fresh_clone.sh                 # the last commit of this checkout
#   TEST=test-all tools/check_fresh_clone.sh   # the slow tests too
#   SKIP_TEST=1 tools/check_fresh_clone.sh     # installs what `make test` needs without running it
set -euo pipefail
source=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

timed() {
  local began=$SECONDS status=0
  bash -c "$1" </dev/null >"$place/log" 2>&1 || status=$?
  printf '%5d s  %s\n' $((SECONDS - began)) "$1"
  if [ $status -ne 0 ]; then
    tail -30 "$place/log" >&2
    echo "failed with status $status: $1" >&2
    exit 1
  fi
}

timed "git clone --quiet --no-hardlinks '$source' '$place/samon'"
cd "$place/samon"
timed "make train"
if [ -n "${SKIP_TEST:-}" ]; then timed "make .venv/.installed-dev"; else timed "make ${TEST:-test}"; fi
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
mapfile -t commands < <(python tools/runnable.py --small)
[ ${#commands[@]} -gt 0 ] || { echo "no block is marked as runnable" >&2; exit 1; }
for command in "${commands[@]}"; do timed "$command"; done
