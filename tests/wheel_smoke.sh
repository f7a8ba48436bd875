#!/usr/bin/env bash
# Installs a wheel into an empty environment beside the torch of the given Python, and trains a step with it.
set -euo pipefail
python=$1 wheel=$(realpath "$2")
case "$wheel" in *-cp310-abi3-*) ;; *) echo "not an abi3 wheel: $wheel"; exit 1 ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
# torch is borrowed by path, not installed a second time; the wheel itself goes into the empty environment.
"$python" -c 'import site; print(site.getsitepackages()[0])' > "$folder/borrowed"
"$folder/venv/bin/python" -m pip install -q --no-deps "$wheel"
cd "$folder"
PYTHONPATH=$(cat borrowed) "$folder/venv/bin/python" - <<'PY'
import sys

import torch
import torch.nn.functional as F

import torch_slide as ts

assert sys.prefix in ts.__file__, ts.__file__
for module in ("faiss", "matplotlib", "tqdm", "sklearn"):
    assert module not in sys.modules, module
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5000))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
ts.convert(model, ["2"], lsh=ts.LSHConfig.auto(16, 5000).replace(num_active=256), optimizer=optimizer)
x, y = torch.randn(64, 8), torch.randint(0, 5000, (64,))
losses = []
for _ in range(60):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
print("wheel works:", ts.info.info() if hasattr(ts, "info") else ts.__version__)
PY
