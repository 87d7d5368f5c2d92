"""TransformerLens' bridge as a contender of bench/capture.py, run by the Python of an environment that has it.

Reads batches from a folder, then for every line on its standard input reads them through the bridge once, saves the
last token of each block, and answers with a line.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge


@torch.no_grad()
def main() -> None:
    folder = Path(sys.argv[1])
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    saved = load_file(folder / "batches.safetensors")
    batches = [(saved[f"ids.{i}"], saved[f"mask.{i}"]) for i in range(len(saved) // 2)]
    names = [f"blocks.{i}.hook_out" for i in range(bridge.cfg.n_layers)]
    for _ in sys.stdin:
        found = []
        for ids, mask in batches:
            cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=names, prepend_bos=False)[1]
            found.append(torch.stack([cache[name][:, -1] for name in names]))
        save_file({"values": torch.cat(found, dim=1)}, folder / "found.safetensors")
        sys.stdout.write("done\n")
        sys.stdout.flush()


main()
