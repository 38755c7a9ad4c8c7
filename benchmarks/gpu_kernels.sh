#!/usr/bin/env bash
# All that is worth knowing about the kernels on a GPU, the most important first; what is written so far survives a kill.
#
#   OUT=results bash benchmarks/gpu_kernels.sh
#
# Needs torch, triton, numpy, pytest and a C++ compiler. Without a network, first fetch the rest where there is one:
#
#   pip download --no-deps -d wheels scikit-build-core pathspec pybind11 safetensors tyro docstring-parser typeguard hypothesis sortedcontainers
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?set OUT to the folder for the results}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests/helpers"

step() {  # step NAME SECONDS COMMAND...: runs it, keeps its output and how it ended
  local name=$1 limit=$2 status
  shift 2
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  status=$?
  echo "$(date -u +%H:%M:%S) $name: exit $status" | tee -a "$out/steps.txt"
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
[ -d wheels ] && step wheels 60 python -m pip install --no-index --no-deps wheels/*.whl
step install 150 python -m pip install --no-build-isolation --no-deps -e .
# Right before fast: a time of a kernel that is wrong says nothing.
step tests 240 python -m pytest -q -m gpu tests/kernels tests/ops tests/models tests/sampling tests/training
for op in $(python -c 'from benchmarks.kernels.cases import OPS; print(*OPS)'); do
  step "kernels_$op" 120 python -m benchmarks.kernels.sweep --device cuda --op "$op" --out "$out/kernels.jsonl"
done
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck; do
  step "$tool" 200 "$sanitizer" --tool "$tool" --error-exitcode 1 python -m benchmarks.kernels.once --device cuda
done
step tune 60 python -m benchmarks.kernels.sweep --device cuda --out "$out/kernels.jsonl" --tune
cp bilevel_fast/ops/providers.json "$out/"
