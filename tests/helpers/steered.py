"""A random edit, and the input of an edited model's next block, for the tests of edits."""

import torch

from replib.transport.affine import AffineEdit

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


def random_edit(seed=0, d=16, r=3, *, diagonal=False):
    g = torch.Generator().manual_seed(seed)
    u, v, c, s = (torch.randn(*shape, generator=g) for shape in ((d, r), (d, r), (d,), (d,)))
    return AffineEdit(u, v, c, s if diagonal else None)


def next_input(model, batch, layer):
    """What the block after ``layer`` is given, read by wrapping its forward method: no hook."""
    block, seen = model.blocks[layer + 1], []
    forward = block.forward
    block.forward = lambda x, *a, **k: seen.append(x.detach().clone()) or forward(x, *a, **k)
    try:
        with torch.no_grad():
            model.forward(batch)
    finally:
        del block.forward
    return seen[0]
