#!/usr/bin/env bash
# Runs the tests against the _C in $BUILD, which is built with -fsanitize=address,undefined.
set -euo pipefail

case "$PRELOAD" in
    /*libasan*) ;;
    *) echo "make sanitize needs gcc's libasan, which $CXX does not have (try CXX=g++)" >&2; exit 1 ;;
esac
# Leaks are those of the interpreter and of torch, which free little at exit.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$PRELOAD" PYTHONPATH="$PWD/$BUILD"

# -P keeps the working directory, where the plain _C may lie, off the import path.
loaded=$("$PYTHON" -P -c 'import pyoptim._C; print(pyoptim._C.__file__)')
case "$loaded" in
    "$PYTHONPATH"/*) ;;
    *) echo "the plain $loaded was imported in place of the instrumented one" >&2; exit 1 ;;
esac
echo "== running the tests with the address and undefined-behaviour sanitizers"
# test_package, test_cuda_build and test_triton start builds and processes of their own. --capture=sys leaves the
# sanitizers' reports on stderr: a report ends the process, and what pytest has captured until then would be lost.
exec "$PYTHON" -P -m pytest -q -p no:cacheprovider --capture=sys \
    --ignore=tests/test_package.py --ignore=tests/test_cuda_build.py --ignore=tests/test_triton.py "$@"
