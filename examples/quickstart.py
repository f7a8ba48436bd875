import torch

import torch_slide as ts

embedding = torch.nn.Embedding(200_000, 128, sparse=True)
head = ts.SparseLSHLinear(128, 200_000, sparse_grad=True)  # instead of torch.nn.Linear(128, 200_000)
optimizer = ts.optim.LazyAdam([*embedding.parameters(), *head.parameters()], lr=0.01, row_momentum=False)
for words in torch.randint(1_000, (100, 512)):  # 100 batches of 512
    loss = torch.nn.functional.cross_entropy(head(embedding(words)), words + 1)  # computes some 1,400 of 200,000 logits
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss:.2f},", head.stats())
