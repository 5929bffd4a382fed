#!/usr/bin/env bash
# Check and measure DriftRL on a GPU machine: one command, at most eight minutes, no network.
#
#     benchmarks/gpu/check.sh [--wheels FOLDER] [--warp ARCHIVE] [--out FOLDER] [--small] [--cpu] [--parts NAME,...]
#         [--budget SECONDS]
#
# --wheels: what wheels.sh fetched; those that this Python lacks are unpacked into a temporary folder, as is --warp, the
# archive that wheels.sh --warp made; without it the part that simulates by Warp is left out. --out: where JSON
# and log.txt go (benchmarks/results/gpu/<device>). --cpu: run everything on the CPU with tiny sizes, to test the check
# itself. --small: smaller sizes. Exit code: 0 if no part failed or ran out of time, 1 if one did, 2 for bad input or
# where there is no CUDA device. See check.py.
set -euo pipefail

usage="usage: $0 [--wheels FOLDER] [--warp ARCHIVE] [--out FOLDER] [--small] [--cpu] [--parts NAME,...] [--budget SECONDS]"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}

wheels='' warp='' budget=480
arguments=()
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?$usage}; shift ;;
    --warp) warp=${2:?$usage}; shift ;;
    --budget) budget=${2:?$usage}; [[ $budget =~ ^[0-9]+$ ]] || { echo "$usage" >&2; exit 2; }; shift ;;
    --out | --parts) arguments+=("$1" "${2:?$usage}"); shift ;;
    --small | --cpu) arguments+=("$1") ;;
    *) echo "$usage" >&2; exit 2 ;;
  esac
  shift
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
paths=$root:$root/benchmarks
if [[ -n $wheels ]]; then
  missing=$("$python" "$here/needs.py" missing "$wheels")
  if [[ -n $missing ]]; then
    mapfile -t missing <<<"$missing"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
      --root-user-action=ignore --target "$scratch/site" "${missing[@]}"
  fi
  paths=$paths:$scratch/site
fi
if [[ -n $warp ]]; then
  [[ -f $warp ]] || { echo "--warp: no file $warp" >&2; exit 2; }
  "$python" -m tarfile -e "$warp" "$scratch/warp"
  paths=$paths:$scratch/warp
fi

export PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MUJOCO_GL=disable                              # nothing is drawn
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_DIR=$scratch/triton # parts share what they compile
export WARP_CACHE_PATH=${WARP_CACHE_PATH:-$scratch/kernels}
"$python" -m gpu.check --scratch "$scratch" --budget $((budget - SECONDS)) ${arguments[@]+"${arguments[@]}"}
