"""Makes tests/goldens/<name>/ from its request.json: a tiny random checkpoint saved by transformers, and what it answers.

    python tests/goldens/make.py NAME...        (torch and transformers 5 in an environment of their own: optx needs neither)

request.json: {"config": fields of the HF config, "tokens": [batch, length] (default [2, 40]), "scale": of the weights (default
1), "tolerance": relative, of the logits (default 1e-4), "shift": {a vector's last name: what is added to it}}. Weights are drawn
larger than transformers does (else attention is uniform and hides mistakes) and kept as bfloat16 in the file; everything is
computed in float32, checked against float64.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

NEW = 16  # greedy tokens
COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # buffers that the config gives: kept, float32


def draw(model, scale: float, seed: int, shift: dict[str, float]) -> None:
    """Random parameters and buffers: matrices keep the size of what passes through, vectors move around their initial value,
    those named in `shift` around that much more."""
    generator = torch.Generator().manual_seed(seed)
    stored = dict(model.state_dict())
    for name, value in stored.items():
        if not value.dtype.is_floating_point or name.endswith(COMPUTED):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim >= 2:
            new = noise * scale / (1.0 if "embed" in name else max(value.shape[-1], 1) ** 0.5)
        else:
            new = value.float() + 0.3 * noise + shift.get(name.rpartition(".")[2], 0.0)
        value.copy_(new.to(torch.bfloat16).to(value.dtype))


def make(name: str) -> None:
    folder = Path(__file__).parent / name
    request = json.loads((folder / "request.json").read_text())
    config = AutoConfig.for_model(**request["config"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        draw(model, request.get("scale", 1.0), request.get("seed", 0), request.get("shift", {}))
    temporary = folder / "saved"
    kept = {path: value.clone() for path, value in model.state_dict().items() if path.endswith(COMPUTED)}
    model.to(torch.bfloat16)
    for path, value in kept.items():
        owner, _, last = path.rpartition(".")
        setattr(model.get_submodule(owner), last, value)
    model.save_pretrained(temporary)
    for part in ("config.json", "model.safetensors"):
        shutil.move(temporary / part, folder / part)
    shutil.rmtree(temporary)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}  # grouped experts are not for float64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plain).eval()
    batch, length = request.get("tokens", [2, 40])
    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        greedy, gap = tokens[:, : length // 2], np.inf
        for _ in range(NEW):
            last = model(greedy, use_cache=False).logits[:, -1]
            best = torch.topk(last, 2).values
            gap = min(gap, float((best[:, 0] - best[:, 1]).min()))
            greedy = torch.cat([greedy, last.argmax(-1, keepdim=True)], dim=1)
        try:
            exact = model.double()(tokens, use_cache=False).logits
            error = float((logits.double() - exact).norm() / exact.norm())
        except RuntimeError as failed:  # parts of some models are float32 only
            error = float("nan")
            print(f"{name}: no float64: {str(failed)[:80]}")
    np.savez_compressed(
        folder / "answers.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.float().numpy(),
        greedy=greedy.numpy().astype(np.int32)[:, length // 2 :],
    )
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e3
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count:,} parameters, {size:.0f} kB; float32 against float64 {error:.1e}; smallest greedy gap {gap:.2e};"
          f" logits' deviation {float(logits.std()):.2f}")  # fmt: skip


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name.strip("/").rpartition("/")[2])
