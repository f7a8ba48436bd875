#!/usr/bin/env bash
# The C++ under AddressSanitizer and UndefinedBehaviorSanitizer: csrc/core alone, by a driver, and the ops, by the tests
# that lean on them most. The driver runs under valgrind too where that is installed (memcheck knows no AVX-512).
# All of it is built in build/sanitize, never over the normal extension. Needs GCC.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=$(realpath -s "$1") compiler=${CXX:-c++} folder=$PWD/build/sanitize
mkdir -p "$folder"
common=(-std=c++17 -g -ffp-contract=off -Wall -Wno-unknown-pragmas -Icsrc tests/core_driver.cpp csrc/core/*.cpp csrc/kernels/*.cpp)
sanitizers=(-fsanitize=address,undefined -fno-sanitize-recover=all)

echo "== csrc/core under the sanitizers"
"$compiler" -O1 "${sanitizers[@]}" "${common[@]}" -o "$folder/driver_sanitized"
"$folder/driver_sanitized"
for isa in scalar avx2 avx512 avx512bf16; do
    TORCH_SLIDE_ISA=$isa "$folder/driver_sanitized" || [ $? = 2 ]  # 2: this processor does not run it
done

if command -v valgrind > /dev/null; then
    echo "== csrc/core under valgrind"
    "$compiler" -O1 "${common[@]}" -o "$folder/driver"
    for isa in scalar avx2; do
        TORCH_SLIDE_ISA=$isa valgrind -q --error-exitcode=1 --leak-check=full "$folder/driver" || [ $? = 2 ]
    done
else
    echo "== no valgrind here: memcheck left out"
fi

echo "== the ops under the sanitizers"
mkdir -p "$folder/lib"
rm -rf "$folder/lib/torch_slide"
cp -r torch_slide "$folder/lib/"
rm -f "$folder"/lib/torch_slide/*.so
TORCH_SLIDE_SANITIZE=address,undefined "$python" setup.py -q build_ext --build-temp "$folder/temp" \
    --build-lib "$folder/lib" > "$folder/build.log" 2>&1 || { cat "$folder/build.log"; exit 1; }
# Python itself is not instrumented: the run-time library comes first, and with it the exceptions that it watches.
preload=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libstdc++.so)
cd "$folder"
PYTHONPATH=$folder/lib LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 \
    "$python" -m pytest -q -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" -m "not slow" \
    "$root"/tests/test_{hashing,isa,tables_ops,selection,given_tail,sampled_linear,loss_ops,optim,optim_rules,nn}.py "${@:2}"
