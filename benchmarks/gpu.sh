#!/usr/bin/env bash
# All that is worth knowing about the engine on one GPU in nine minutes, the most important first. Every row is written
# as it is measured, so a kill loses only what was being measured.
#
#   OUT=results bash benchmarks/gpu.sh                     SD 2.1 with random weights, 512 px, batch 16, bf16
#   OUT=results bash benchmarks/gpu.sh --device cpu --tiny     the rehearsal, on the mini world
#   BUDGET=1700 OUT=results bash benchmarks/gpu.sh         more time: nothing is begun that might end after it
#   SLOW=4 ROUNDS=4 BUDGET=3600 ...                        every limit four times as long, for a small machine
#
# Needs torch, triton, numpy, transformers, pytest and a C++ compiler. Without a network, first fetch the rest where there
# is one; all of it is pure Python:
#
#   pip download --no-deps -d wheels scikit-build-core pathspec pybind11 tyro docstring-parser typeguard diffusers \
#     importlib-metadata zipp
#
# Afterwards, for the card's name in CARD: cat rows.jsonl >> benchmarks/results/CARD.jsonl.
# Kernels one by one, sanitizers and the table of providers: benchmarks/gpu_kernels.sh. On a card that the table does not
# know, run that first and bring its providers.json along: without it, ours is torch's ops in CUDA graphs.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?set OUT to the folder for the results}
mkdir -p "$out"
device=cuda tiny=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?--device wants cpu or cuda}; shift 2 ;;
    --tiny) tiny=(--tiny); shift ;;
    *) echo "error: there is no flag '$1'; usage: OUT=DIR bash benchmarks/gpu.sh [--device cpu|cuda] [--tiny]" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python}
begin=$SECONDS budget=${BUDGET:-540} rounds=${ROUNDS:-10} slow=${SLOW:-1}

step() {  # step NAME SECONDS COMMAND...: runs it if it can end in time; keeps its output and how it ended
  local name=$1 limit=$(($2 * slow)) status
  shift 2
  if [ $((SECONDS - begin + limit)) -gt "$budget" ]; then
    local left=$((budget - SECONDS + begin))
    echo "$(date -u +%H:%M:%S) $name: not run, it may take $limit s and $left s are left" | tee -a "$out/steps.txt"
    return
  fi
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  status=$?
  echo "$(date -u +%H:%M:%S) $name: exit $status" | tee -a "$out/steps.txt"
}

common=(--device "$device" --rounds "$rounds" --out "$out/rows.jsonl")
if [ "$device" = cuda ]; then
  export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests/helpers"
  nvidia-smi >"$out/nvidia-smi.txt" 2>&1
  [ -d wheels ] && step wheels 40 "$python" -m pip install --no-index --no-deps wheels/*.whl
  "$python" -c 'import bilevel_fast.ops.native._C' 2>/dev/null ||
    step install 150 "$python" -m pip install --no-build-isolation --no-deps -e .
  # Right before fast: graphs that are the run they stand for, optimizers, the loader, fp8.
  step tests 60 "$python" -m pytest -q -m gpu tests/models tests/sampling tests/training tests/profiling tests/data
fi
step step 150 "$python" -m benchmarks.speed.step "${tiny[@]}" "${common[@]}" --ladder
step alignment 60 "$python" -m benchmarks.speed.alignment "${tiny[@]}" "${common[@]}" --full
step unet 90 "$python" -m benchmarks.speed.unet "${tiny[@]}" "${common[@]}" --providers eager torch graphs ours
step roofline 40 bash -c "'$python' -m benchmarks.counts.roofline --validate --device $device --json | tee -a '$out/rows.jsonl'"
step profile 60 "$python" -m bilevel_fast.profile --device "$device" --profile-out "$out/profile" --preset smoke --lower.batch 16
step step_055 60 "$python" -m benchmarks.speed.step "${tiny[@]}" "${common[@]}" --structure 0.55 --peers eager
step step_batch_2 60 "$python" -m benchmarks.speed.step "${tiny[@]}" "${common[@]}" --batch 2 --ladder --peers eager
step compile 200 "$python" -m benchmarks.speed.step "${tiny[@]}" "${common[@]}" --peers compile
step mixture 60 "$python" -m benchmarks.speed.mixture "${tiny[@]}" "${common[@]}" --batch 16
