#!/usr/bin/env bash
# Build blockhess with CUDA and run all checks and measurements on a GPU, in ten minutes:
#
#     bench/run_gpu.sh OUT_DIR                full sizes; targets are judged
#     bench/run_gpu.sh OUT_DIR --quick        the same in three minutes
#     bench/run_gpu.sh OUT_DIR --dry-run      the same on a CPU, at tiny sizes, to check the script without a GPU
#       ... --reuse-build                     use the _C module of the checkout instead of a build (dry run only)
#
# Requires nvcc and a Python with torch, numpy, scipy, pybind11, ninja, setuptools and pytest; nothing is downloaded.
# PYTHON names the interpreter (default: python3), BLOCKHESS_COMMIT the commit of sources without git. PYTHONPATH is kept.
# Sources are copied and built in a temporary folder, without pyproject.toml, which older versions of setuptools refuse.
# OUT_DIR gets results.json, results.md and logs.tar.gz.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

out='' options=()
for argument in "$@"; do
  case "$argument" in
    --quick | --dry-run | --reuse-build | --seconds=*) options+=("$argument") ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$argument ;;
  esac
done
[ -n "$out" ] || usage
case " ${options[*]-} " in *' --reuse-build '*) case " ${options[*]} " in *' --dry-run '*) ;; *) usage ;; esac ;; esac

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" && out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$root" && tar cf - --exclude='*.so' --exclude=__pycache__ --exclude='bench/results' setup.py csrc blockhess_ext \
  python tests bench) | tar xf - -C "$work"
BLOCKHESS_COMMIT=${BLOCKHESS_COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
export BLOCKHESS_COMMIT BLOCKHESS_SOURCE="$root" PYTHONPATH="$work:$work/python${PYTHONPATH:+:$PYTHONPATH}"
cd "$work"
"${PYTHON:-python3}" -m bench.gpu "$out" ${options[@]+"${options[@]}"}
