"""Run by wheel_smoke.sh in an environment that has the wheel and torch only: a model is converted and learns."""

import os
import sys

import torch
import torch.nn.functional as F

before = set(sys.modules)  # torch itself imports tqdm where it finds it
try:
    import torch_slide as ts
    from torch_slide.info import info
except ValueError as error:
    if os.environ["TORCH_SLIDE_ISA"] not in str(error):
        raise
    print(f"not tried: {error}")
    sys.exit()

assert ts.__file__.startswith(sys.prefix), ts.__file__
assert not {"faiss", "matplotlib", "tqdm", "sklearn"} & (set(sys.modules) - before)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5000))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
lsh = ts.LSHConfig.auto(16, 5000).replace(num_active=256)
ts.convert(model, ["2"], lsh=lsh, optimizer=optimizer)
x, y = torch.randn(64, 8), torch.randint(0, 5000, (64,))
losses = []
for _ in range(60):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
print(f"trains on {info()['isa']}: torch_slide {ts.__version__}, torch {torch.__version__}, python {sys.version[:6]}")
