#!/usr/bin/env bash
# Builds the CUDA engine for this machine's GPU, checks every op on it, a small case under
# compute-sanitizer, then times them: bash tests/gpu/run.sh FOLDER. Needs a GPU, CUDA 13 and python3
# with torch, pybind11, cmake and ninja; no network. Where ALIGNPRO_TEST_PRODUCTS has a choice, what
# it changes runs once with each. Leaves in FOLDER: check.json, bench.json, bench.md, build.log and,
# on sm_90, check_wgmma.json. Exits with 1 where an op is wrong, 2 where something needed is missing.
set -euo pipefail

(($# == 1)) || { echo "usage: bash tests/gpu/run.sh FOLDER" >&2; exit 2; }
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
mkdir -p "$1"
out="$(cd "$1" && pwd)"

missing() { echo "tests/gpu/run.sh: $*" >&2; exit 2; }
for candidate in "${CUDACXX:-}" nvcc /usr/local/cuda/bin/nvcc; do
  [[ -n "$candidate" ]] && CUDACXX="$(command -v "$candidate")" && break
done || true
[[ -n "${CUDACXX:-}" ]] || missing "expected nvcc (CUDA 13) on PATH or in CUDACXX, found none"
export CUDACXX
unset ALIGNPRO_TEST_PRODUCTS # each choice runs below
for tool in cmake ninja python3 g++; do
  command -v "$tool" >/dev/null || missing "expected $tool on PATH, found none"
done
python3 -c 'import torch, pybind11' 2>/dev/null || missing "expected python3 with torch and pybind11"
capability="$(python3 - <<'PY'
import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else ""))
PY
)"
[[ -n "$capability" ]] || missing "expected a GPU that torch can use, found none"

started=$SECONDS
section() { printf '\n=== %s (%d s)\n' "$1" "$((SECONDS - started))"; }

section "build for sm_$capability"
cmake -S "$repository" -B "$out/build" -G Ninja -DALIGNPRO_CUDA=ON -DALIGNPRO_PYTHON=ON \
  -DALIGNPRO_TESTING=ON \
  -DCMAKE_CUDA_ARCHITECTURES="$capability" \
  -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(command -v python3)" \
  >"$out/build.log"
cmake --build "$out/build" --target _core _testing >>"$out/build.log" 2>&1 || {
  tail -n 40 "$out/build.log" >&2
  exit 1
}
python3 "$repository/csrc/cuda/check_spills.py" "$out/build.log"
# The package as it would be installed: the sources and the extensions side by side.
rm -rf "$out/python" && mkdir "$out/python"
cp -r "$repository/python/alignpro" "$out/python/alignpro"
rm -f "$out"/python/alignpro/*.so
cp "$out"/build/_core*.so "$out"/build/_testing*.so "$out/python/alignpro/"
export PYTHONPATH="$out/python:$repository/tests"

failed=0
section "ops against float64"
python3 -m gpu.check "$out/check.json" || failed=1
if [[ "$capability" == 90a ]]; then
  section "the same by wgmma"
  ALIGNPRO_TEST_PRODUCTS=wgmma python3 -m gpu.check "$out/check_wgmma.json" linear linear_logprob \
    linear_logprob_backward head_sample head_sample_truncated || failed=1
fi

section "compute-sanitizer on small cases"
sanitizer="$(command -v compute-sanitizer || command -v "$(dirname "$CUDACXX")/compute-sanitizer" || true)"
if [[ -n "$sanitizer" ]]; then
  for tool in memcheck racecheck; do
    timeout 150 "$sanitizer" --tool "$tool" --error-exitcode 1 --print-limit 5 \
      python3 -m gpu.check "$out/sanitizer.json" embedding soft_rows mix_rows rms_norm rope_kv_write \
      kv_copy \
      embedding_backward qk_norm_backward linear_logprob_at_the_edges || failed=1
  done
  if [[ "$capability" == 90a ]]; then
    ALIGNPRO_TEST_PRODUCTS=wgmma timeout 150 "$sanitizer" --tool memcheck --error-exitcode 1 \
      --print-limit 5 python3 -m gpu.check "$out/sanitizer.json" linear || failed=1
  fi
else
  echo "compute-sanitizer: not on this machine"
fi

section "benchmarks"
python3 -m gpu.bench "$out/bench.json" "$out/bench.md" || failed=1
if [[ "$capability" == 90a ]]; then
  ALIGNPRO_TEST_PRODUCTS=wgmma python3 -m gpu.bench "$out/bench.json" "$out/bench.md" \
    linear head_sample linear_logprob || failed=1
fi
[[ -f "$out/bench.md" ]] && cat "$out/bench.md"

section "done, $( ((failed)) && echo with failures || echo all good)"
exit "$failed"
