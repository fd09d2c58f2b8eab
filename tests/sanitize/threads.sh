#!/usr/bin/env bash
# Links threads.cpp with the engine that setup.py built with -fsanitize=thread, and runs it.
set -euo pipefail

flags=(-std=c++17 -O1 -g -fsanitize=thread -pthread -Wall -Wextra -Icsrc)
tag=$("$PYTHON" -c 'import sys; print(sys.implementation.cache_tag)')
mkdir -p "$BUILD"
"$CXX" "${flags[@]}" -shared -fPIC -Wl,-soname,libtorch_cpu.so tests/sanitize/libtorch_cpu.cpp \
    -o "$BUILD/libtorch_cpu.so"
"$CXX" "${flags[@]}" tests/sanitize/threads.cpp build/ninja-*-"$tag"-thread/csrc/cpu/*.o \
    -Wl,--no-as-needed "$BUILD/libtorch_cpu.so" -Wl,-rpath,"$PWD/$BUILD" -ldl -o "$BUILD/threads"

echo "== running the engine with the thread sanitizer"
# gcc 12's sanitizer stops with "unexpected memory mapping" under the address randomization of newer kernels.
command -v setarch >/dev/null && fixed_addresses=(setarch "$(uname -m)" -R) || fixed_addresses=()
TSAN_OPTIONS=halt_on_error=1 exec "${fixed_addresses[@]}" "$BUILD/threads"
