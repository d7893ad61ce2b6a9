#!/usr/bin/env bash
# Run all checks of blockhess on a GPU:
#
#     bench/run_gpu.sh OUT_DIR                build with CUDA, tests, sanitizers, benchmarks; under ten minutes
#     bench/run_gpu.sh OUT_DIR --dry-run      the same script on a CPU, to check the script without a GPU
#       ... --reuse-build                     use the _C module of the checkout instead of a build (dry run only)
#
# Requires nvcc and a Python with torch, numpy, scipy, pybind11, ninja, setuptools and pytest; nothing is downloaded.
# PYTHON names the interpreter (default: python3). Sources are copied and built in a temporary folder. OUT_DIR gets a
# log of every step, results.json, results.md and summary.txt. After a failed step the others run, and the exit code is
# 1. BLOCKHESS_COMMIT gives the commit of sources without git.
set -uo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }

out='' dry=0 reuse=0
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry=1 ;;
    --reuse-build) reuse=1 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$argument ;;
  esac
done
[ -n "$out" ] && [ "$reuse" -le "$dry" ] || usage

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
for name in machine build tests tests_skip tests_on_cpu sanitizer_case memcheck racecheck initcheck bench; do
  rm -f "$out/$name.log"
done
rm -f "$out/summary.txt" "$out/results.json" "$out/results.md"

BLOCKHESS_COMMIT=${BLOCKHESS_COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
export BLOCKHESS_COMMIT PYTHONPATH="$work:$work/python" PYTHONDONTWRITEBYTECODE=1
[ $dry = 0 ] || export CUDA_VISIBLE_DEVICES=
failed=0 deadline=590 reserved=160  # seconds: for everything, and of these for the benchmarks

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# step NAME SECONDS COMMAND...: run the command in the copy with a time limit and write its output to NAME.log.
step() {
  local name=$1 limit=$2 begin=$SECONDS code=0 left=$((deadline - reserved - SECONDS))
  shift 2
  [ "$limit" -le "$left" ] || limit=$((left > 1 ? left : 1))
  (cd "$work" && timeout --kill-after=10 "$limit" "$@") >"$out/$name.log" 2>&1 || code=$?
  case $code in
    0) say "$(printf '%-22s ok, %d s' "$name" $((SECONDS - begin)))" ;;
    124 | 137) failed=1; say "$(printf '%-22s FAILED: exceeded %d s, see %s.log' "$name" "$limit" "$name")" ;;
    *) failed=1; say "$(printf '%-22s FAILED: exit code %d, see %s.log' "$name" "$code" "$name")" ;;
  esac
  return $code
}

# Copy the sources, without build outputs and environments.
copy() {
  (cd "$root" && tar cf - --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md LICENSE \
    csrc blockhess_ext python tests bench) | tar xf - -C "$work"
}

machine() {
  nvidia-smi || echo 'no nvidia-smi'
  nvcc --version || echo 'no nvcc'
  "$python" -c 'import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda,
    [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])'
}

# Print the architecture of this GPU, to build and test its native code.
architecture() {
  "$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null
}

# Print the path of compute-sanitizer: on PATH, or in a CUDA toolkit that is not on PATH.
sanitizer() {
  command -v compute-sanitizer && return
  local folder
  for folder in "$(dirname "$(command -v nvcc || echo .)")" "${CUDA_HOME:-/usr/local/cuda}/bin" /usr/local/cuda/bin; do
    [ -x "$folder/compute-sanitizer" ] && echo "$folder/compute-sanitizer" && return
  done
  return 1
}

say "blockhess $BLOCKHESS_COMMIT$([ $dry = 1 ] && echo ', dry run on the CPU: nothing here is proven on hardware')"
copy || { say 'sources                FAILED: cannot be copied'; exit 1; }
machine >"$out/machine.log" 2>&1

if [ $reuse = 1 ]; then
  step build 30 cp "$root"/blockhess_ext/_C*.so blockhess_ext/
elif [ $dry = 1 ]; then
  step build 300 env BLOCKHESS_CUDA=0 "$python" setup.py build_ext --inplace
else
  arch=${TORCH_CUDA_ARCH_LIST:-$(architecture)}
  step build 200 env BLOCKHESS_CUDA=1 ${arch:+TORCH_CUDA_ARCH_LIST="$arch"} MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    "$python" setup.py build_ext --inplace
fi || { say 'the other steps need the build'; exit 1; }

pytest=("$python" -m pytest -q -rs -p no:cacheprovider tests/gpu)
if [ $dry = 1 ]; then
  # pytest exits with 5 if every module is skipped.
  step tests_skip 60 bash -c '"$@"; code=$?; [ $code = 5 ]' _ "${pytest[@]}"
  step tests_on_cpu 120 env BLOCKHESS_TEST_DEVICE=cpu "${pytest[@]}"
  step sanitizer_case 60 "$python" -m tests.gpu.sanitizer_case --cpu
  reserved=0
  step bench 60 "$python" -m bench.ops.gpu --cpu --out "$out"
else
  step tests 150 env BLOCKHESS_REQUIRE_GPU=1 "${pytest[@]}"
  if tool=$(sanitizer); then
    for check in memcheck racecheck initcheck; do
      step "$check" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --error-exitcode 86 \
        "$python" -m tests.gpu.sanitizer_case
    done
  else
    say 'compute-sanitizer      not found: memcheck, racecheck and initcheck skipped'
  fi
  reserved=0
  step bench 240 "$python" -m bench.ops.gpu --out "$out"
fi

[ -f "$out/results.md" ] && { echo; cat "$out/results.md"; }
say "$([ $failed = 0 ] && echo 'all steps passed' || echo 'SOME STEPS FAILED') in $SECONDS s; logs in $out"
exit $failed
