#!/usr/bin/env bash
# All that is worth knowing about the engine on one GPU in nine minutes, in the order of value: the table of providers,
# the step and its rivals, that it is right, the rest; then a page that says which goals are met.
#
#   OUT=results bash benchmarks/gpu.sh              SD 2.1 with random weights, 512 px, batch 16, bf16
#   OUT=results bash benchmarks/gpu.sh --rehearse   the same commands at the smallest sizes on a CPU, in some minutes
#   BUDGET=1700 OUT=results bash benchmarks/gpu.sh  more time than 540 s
#
# Every row is written as it is measured, and a phase that fails or is killed stops no other. Started again with the same
# OUT, phases that ended well are left out, and the kernels go on where they stopped. phases.txt says how each ended and
# which were left out; verdict.md is the page. The table of providers is replaced in the tree, and copied to OUT.
#
# Needs torch, triton, numpy, transformers, pytest and a C++ compiler. Without a network, first fetch the rest where there
# is one; all of it is pure Python:
#
#   pip download --no-deps -d wheels scikit-build-core pathspec pybind11 safetensors tyro docstring-parser typeguard diffusers \
#     importlib-metadata zipp hypothesis sortedcontainers
#
# Afterwards, for the card's name in CARD: cat rows.jsonl >> benchmarks/results/CARD.jsonl, kernels.jsonl likewise as
# benchmarks/results/kernels_CARD.jsonl, and commit providers.json.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?set OUT to the folder for the results}
mkdir -p "$out/done"
rehearse=
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=1; shift ;;
    *) echo "error: there is no flag '$1'; usage: OUT=DIR bash benchmarks/gpu.sh [--rehearse]" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python}
begin=$SECONDS budget=${BUDGET:-540} last=15 # seconds for the page
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests/helpers"

note() { echo "$(date -u +%H:%M:%S) $*" | tee -a "$out/phases.txt"; }

phase() { # phase NAME SECONDS COMMAND...: runs it within its share of the time; keeps its output and how it ended
  local name=$1 limit=$2 left=$((budget - last - SECONDS + begin)) start=$SECONDS status
  shift 2
  if [ -e "$out/done/$name" ]; then note "$name: done before"; return; fi
  if [ "$left" -lt $((limit / 2)) ]; then note "$name: skipped, it may take $limit s and $left s are left"; return 1; fi
  [ "$left" -lt "$limit" ] && limit=$left
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1 </dev/null
  status=$?
  case $status in
    0) touch "$out/done/$name"; note "$name: done, $((SECONDS - start)) s" ;;
    124 | 137) note "$name: killed after $limit s" ;;
    *) note "$name: failed with $status: $(tail -n 1 "$out/$name.txt" | cut -c1-200)" ;;
  esac
  return $status
}

module() { local name=$1 limit=$2; shift 2; phase "$name" "$limit" "$python" -m "$@"; }

if [ -z "$rehearse" ]; then
  device=cuda batch=16 rounds=10 tiny=() table=bilevel_fast/ops/providers.json
  full=(--full) profile=(--preset smoke --lower.batch 16) experts=4
else
  device=cpu batch=1 rounds=4 tiny=(--tiny) table=$out/providers.json
  full=() profile=(--preset smoke --lower.batch 2 --upper.batch 2) experts=2
  export TRITON_INTERPRET=1
  [ -e "$table" ] || cp bilevel_fast/ops/providers.json "$table"
fi
kernels=(benchmarks.kernels.sweep --device "$device" --rounds "$rounds" --out "$out/kernels.jsonl")
common=(--device "$device" --rounds "$rounds" "${tiny[@]}" --out "$out/rows.jsonl")
tune() { module "$1" 30 benchmarks.kernels.sweep --tune --table "$table" --out "$out/kernels.jsonl"; }
gpu_tests() { local name=$1 limit=$2; shift 2; module "$name" "$limit" pytest -q -m gpu -p no:cacheprovider "$@"; }

if [ "$device" = cuda ]; then
  nvidia-smi >"$out/nvidia-smi.txt" 2>&1
  [ -d wheels ] && phase wheels 40 "$python" -m pip install --no-index --no-deps wheels/*.whl
  "$python" -c 'import bilevel_fast.ops.native._C' 2>/dev/null ||
    phase install 150 "$python" -m pip install --no-build-isolation --no-deps -e .
fi

# Who runs what. A kernel that breaks the GPU for its process ends it; the next one goes on behind that case.
module kernels 170 "${kernels[@]}" --batch "$batch"
case $? in 0 | 124 | 137) ;; *) module kernels_again 100 "${kernels[@]}" --batch "$batch" ;; esac
tune tune && cp "$table" "$out/providers.json" 2>/dev/null

# Ours against the peers, every technique by itself.
module step 170 benchmarks.speed.step "${common[@]}" --batch "$batch" --ladder

# Graphs that are the run they stand for, optimizers, losses. Their kernels are compiled first: not under two minutes.
gpu_tests tests 130 tests/training/test_graphs.py tests/kernels/test_adamw_ema.py tests/ops/native/test_cuda.py

# The rest.
module unet 60 benchmarks.speed.unet "${common[@]}" --batch "$batch" --providers eager torch graphs ours
phase roofline 40 bash -c "set -o pipefail; '$python' -m benchmarks.counts.roofline --validate --device $device --batch $batch --rounds $rounds --json | tee -a '$out/rows.jsonl'"
module profile 60 bilevel_fast.profile --device "$device" --profile-out "$out/profile" "${profile[@]}"
module step_055 60 benchmarks.speed.step "${common[@]}" --batch "$batch" --structure 0.55 --peers eager
module step_batch_2 60 benchmarks.speed.step "${common[@]}" --batch 2 --ladder --peers eager
module alignment 60 benchmarks.speed.alignment "${common[@]}" --batch "$batch" "${full[@]}"
module mixture 60 benchmarks.speed.mixture "${common[@]}" --batch "$batch" --experts "$experts"
module kernels_batch_2 120 "${kernels[@]}" --batch 2
tune tune_batch_2 && cp "$table" "$out/providers.json" 2>/dev/null
if [ "$device" = cuda ]; then # what a CPU has no form of, or takes minutes for
  gpu_tests tests_rest 240 tests/kernels tests/models tests/sampling tests/training tests/profiling tests/data
  module step_compile 200 benchmarks.speed.step "${common[@]}" --batch "$batch" --peers compile
  module kernels_compile 300 "${kernels[@]}" --batch "$batch" --compile
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  for tool in memcheck racecheck; do
    phase "$tool" 200 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m benchmarks.kernels.once --device cuda
  done
fi

timeout -k 5 60 "$python" -m benchmarks.pages.verdict --folder "$out" >"$out/verdict.md" 2>"$out/verdict.txt" </dev/null
cat "$out/verdict.md" "$out/verdict.txt"
