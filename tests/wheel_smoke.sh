#!/usr/bin/env bash
# Looks into a wheel, installs it into an empty environment beside the torch of the given Python, and trains with it on
# every instruction set of this processor.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$(realpath -s "$1") wheel=$(realpath "$2")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"$python" "$here/wheel_contents.py" "$wheel"
"$python" -m venv venv
venv/bin/python -m pip install -q --no-deps "$wheel"
# torch is borrowed by path, not installed a second time; a .pth file of the lender is not read this way.
borrowed=$("$python" -c 'import site; print(site.getsitepackages()[0])')
for isa in "" scalar avx2 avx512 avx512bf16; do
    PYTHONPATH=$borrowed TORCH_SLIDE_ISA=$isa venv/bin/python "$here/wheel_train.py"
done
