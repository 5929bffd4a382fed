#!/usr/bin/env bash
# Fetch the wheels that check.sh needs on a machine without a network: Python 3.12, x86-64 Linux.
#
#     benchmarks/gpu/wheels.sh FOLDER [--warp] [--without NAME]...
#
# The machine has torch 2.11, NumPy, TensorBoard and pytest, each with its own dependencies; FOLDER gets what DriftRL
# and its tests marked gpu import beside them, in the versions of requirements.lock. --without leaves out what the
# machine has too (scipy is two thirds of the size). --warp fetches mujoco-warp and warp-lang, 132 MiB, and packs what a
# GPU machine needs of them into FOLDER-warp/warp.tar.xz, apart from the others, in some minutes. Fails above 60 MiB
# for the wheels or 64 MiB for the archive, and if a dependency of a wheel is nowhere.
set -euo pipefail

usage="usage: $0 FOLDER [--warp] [--without NAME]..."
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lock=$here/../../requirements.lock
python=${PYTHON:-python3}
limit_mib=60 warp_limit_mib=64

folder='' warp=''
without=()
while (($#)); do
  case $1 in
    --warp) warp=yes ;;
    --without) without+=("${2:?$usage}"); shift ;;
    -*) echo "$usage" >&2; exit 2 ;;
    *) folder=$1 ;;
  esac
  shift
done
[[ -n $folder ]] || { echo "$usage" >&2; exit 2; }

# What is fetched, and for what. SciPy is newer than the lock's: that one refuses the NumPy 2.5 of such a machine.
wheels='
gymnasium             environments
farama-notifications  gymnasium
cloudpickle           gymnasium
mujoco                simulator
absl-py               mujoco
glfw                  rendering
imageio               rendering
pillow                imageio
stable-baselines3     agents
tyro                  options
docstring-parser      tyro
typeguard             tyro
typing-extensions     typing
tqdm                  progress
rich                  progress
markdown-it-py        rich
mdurl                 rich
pygments              rich
hypothesis            tests
sortedcontainers      hypothesis
scipy==1.17.1         tests
'

fetch() { # FOLDER NAME==VERSION...
  local into=$1 platforms=() tag
  shift
  for tag in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$into" "$@"
}

size() { # bytes of the wheels in a folder
  cat "$1"/*.whl | wc -c
}

mkdir -p "$folder"
rm -f "$folder"/*.whl
pins=()
while read -r name reason; do
  [[ -n $name && " ${without[*]-} " != *" ${name%%==*} "* ]] || continue
  pin=$(grep -oE '.+==.+' <<<"$name" || grep -m1 -oE "^$name==[^ ;]+" "$lock") || { echo "$name: not in requirements.lock" >&2; exit 1; }
  printf '%-30s %s\n' "$pin" "$reason"
  pins+=("$pin")
done <<<"$wheels"
fetch "$folder" "${pins[@]}"
"$python" "$here/needs.py" complete "$folder" "${without[@]}"
bytes=$(size "$folder")
printf '%s: %d wheels, %d.%d MiB\n' "$folder" "$(find "$folder" -name '*.whl' | wc -l)" \
  $((bytes >> 20)) $(((bytes % (1 << 20)) * 10 >> 20))
if ((bytes > limit_mib << 20)); then
  echo "above the limit of $limit_mib MiB" >&2
  exit 1
fi

if [[ -n $warp ]]; then # the versions that go together with mujoco 3.8.1
  mkdir -p "$folder-warp"
  rm -f "$folder-warp"/*.whl
  fetch "$folder-warp" mujoco-warp==3.8.1 warp-lang==1.12.1
  "$python" "$here/slim.py" "$folder-warp"
  if (($(wc -c <"$folder-warp/warp.tar.xz") > warp_limit_mib << 20)); then
    echo "above the limit of $warp_limit_mib MiB" >&2
    exit 1
  fi
fi
