"""What transformers answers for a checkpoint, as a file of numpy.

    python tests/golden/transformers_logits.py FOLDER TOKENS.npy OUT.npy     (torch and transformers in an environment
                                                                              of their own)

TOKENS: int[B, T]; OUT: float32[B, T, vocab]. Exits 1 where parameters are missing, left over or of another shape.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(folder: Path, tokens: Path, out: Path) -> int:
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in told.items() if names}
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(np.load(tokens).astype(np.int64))).logits
    np.save(out, logits.float().numpy())
    print(type(model).__name__, wrong or "every parameter found")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
