#!/usr/bin/env bash
# All benchmarks in turn, each a table on the screen and a JSON file in OUT.
#
#   scripts/benchmark/all.sh [--gpu] OUT [IMAGES]
#
# IMAGES is a folder of JPEGs as of ImageNet, for data.py. Under 15 minutes on 2 CPU cores; --gpu
# measures what a GPU does, under 9 minutes. Other programs on the machine spoil the figures.
set -u

usage() { echo "usage: $0 [--gpu] OUT [IMAGES]" >&2; exit 2; }

gpu=""
if [ "${1:-}" = "--gpu" ]; then gpu=yes; shift; fi
case "${1:-}" in "" | -*) usage ;; esac
[ $# -le 2 ] || usage
out=$1 images=${2:-}
here=$(cd "$(dirname "$0")" && pwd) || exit 1
[ -x "$here/../../.venv/bin/python" ] && PYTHON=${PYTHON:-$here/../../.venv/bin/python}
python=${PYTHON:-python3}
mkdir -p "$out" || exit 1
failed=""

run() {  # NAME SCRIPT ARGUMENTS...: writes OUT/NAME.json
  local name=$1 script=$2 began=$SECONDS
  shift 2
  echo "=== $name"
  "$python" "$here/$script" "$@" --out "$out/$name.json" || failed="$failed $name"
  echo "($((SECONDS - began)) s)"
}

if [ -n "$gpu" ]; then
  run step_gpu step.py --device cuda --compile
  run step_gpu_groups step.py --device cuda --cases resnet50:224:256 --bn-splits 8 --compile
  run loss_gpu loss.py --device cuda
else
  run loss loss.py --device cpu
  run step step.py --device cpu
  run shuffle shuffle.py
  if [ -n "$images" ]; then run data data.py "$images"; else run data data.py; fi
  run lincls lincls.py
  run file_list file_list.py
  run saving saving.py
fi
if [ -n "$failed" ]; then
  echo "failed:$failed" >&2
  exit 1
fi
