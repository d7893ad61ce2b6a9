#!/usr/bin/env bash
# The op tests on a build of the extension with the address and undefined-behavior sanitizers of gcc.
#
#   tests/sanitizers.sh [PYTEST ARGUMENT ...]     from any folder; PYTHON is the interpreter (default python3), OUT a
#                                                 JSON file for the result
#
# torch itself is not instrumented, but its allocations are checked. Before the tests, two planted bugs must be found: a
# read past the end of a tensor and a signed overflow. pytest captures only sys.stderr, so reports reach the terminal.
set -euo pipefail
out=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
tree=build/sanitizers
tests=(tests/ext/test_{lanczos_step,reorthogonalize,tridiag_quadrature,gaussian_density,random_probes,linear_combination,slq,quadrature,arguments,breakdown})

mkdir -p "$tree"
# cp -u leaves unchanged files alone, so that only changed sources are compiled again.
cp -ru blockhess_ext csrc python tests setup.py pyproject.toml README.md LICENSE "$tree"
cd "$tree"
rm -f blockhess_ext/*.so

build() {
    CXX=g++ CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1" \
        LDFLAGS="-fsanitize=address,undefined" BLOCKHESS_CUDA=0 \
        "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { tail -50 build.log; return 1; }
}

checked() {
    # libstdc++ too: the sanitizer looks up the functions that throw exceptions when it starts.
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" \
        PYTHONPATH=.:python "$python" "$@"
}

planted() { # FILE, BUG TO INSERT AFTER THE FIRST MATCH OF, PATTERN, EXPECTED REPORT
    cp "$1" original
    sed -i "0,/$3/s//&$2/" "$1"
    cmp -s "$1" original && { echo "sanitizers: no place for the bug in $1"; exit 1; }
    build
    checked -m pytest -q -x --capture=sys -p no:cacheprovider tests/ext/test_gaussian_density.py >control.log 2>&1 && missed=1 || missed=0
    cp original "$1"
    if ((missed)) || ! grep -q "$4" control.log; then
        tail -30 control.log
        echo "sanitizers: the planted bug was not found: $4"
        exit 1
    fi
    echo "found, as planted: $(grep -m 1 -o "$4" control.log)"
}

file=csrc/cpu/gaussian_density.cpp
after='const double sigma = op.sigma\[row\].*'
planted $file ' volatile double past = op.sigma[op.n_rows]; (void)past;' "$after" 'heap-buffer-overflow'
planted $file ' volatile int64_t most = INT64_MAX; most = most + op.n_rows;' "$after" 'signed integer overflow'

build
checked -m pytest -q --capture=sys -p no:cacheprovider --junitxml=report.xml "${tests[@]/%/.py}" "$@"

if [[ -n ${out:-} ]]; then
    cd ../..
    PYTHONPATH=.:python "$python" - "$tree/report.xml" "$out" <<'END'
import json, sys
from xml.etree import ElementTree

from bench.harness.environment import describe

suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
found = ["heap-buffer-overflow", "signed integer overflow"]
result = counts | {"seconds": float(suite.get("time")), "planted_and_found": found, "machine": describe()}
open(sys.argv[2], "w").write(json.dumps(result, indent=1) + "\n")
END
fi
