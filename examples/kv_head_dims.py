"""What formats of the KV cache cost with heads of 64 and of 128 dims, on keys with outlier channels.

    python examples/kv_head_dims.py [--out FOLDER]

The small models whose quality the ablations measure have heads of 64 (SmolLM2) or 256 dims; an 8B model has 128. This draws one
layer of attention with each, Qwen3-8B's grouping, and keys as trained models have them: a few channels of each head, those that
RoPE turns slowest, have a large mean that tokens share (KIVI, arXiv:2402.02750, figure 2; KVQuant, arXiv:2401.18079, section
3.1). Printed is the relative error of the layer's output under each format, over keys with and without such channels.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import optx
from optx import ir
from optx.nn.attention import Attention
from optx.nn.core import Embed, GatedMLP, RMSNorm, Rope
from optx.nn.decoder import Block, CausalLM
from optx.ragged import Ragged
from optx.recipe import Recipe
from optx.report import table

D, HEADS, KV_HEADS, TOKENS = 512, 8, 2, 1024
OUTLIERS = 4  # channels a head
MEAN = 12.0  # of an outlier channel, in standard deviations of the others
PEAK = 3.0  # standard deviation of the logits: with random weights attention would be flat

HADAMARD = [{"pass": "rotate", "stream": False}, {"pass": "rotate_online", "down": False}]
FORMATS = {
    "int8": {"cache": [{"pass": "quantize_kv", "format": "int8"}]},
    "fp8": {"cache": [{"pass": "quantize_kv", "format": "fp8_e4m3"}]},
    "int4 symmetric": {"cache": [{"pass": "quantize_kv", "format": "int4"}]},
    "int4": {"cache": [{"pass": "quantize_kv", "format": "int4", "symmetric": False}]},
    "int4 Hadamard": {"fold": HADAMARD, "cache": [{"pass": "quantize_kv", "format": "int4", "symmetric": False}]},
    "turbo4": {"fold": [{"pass": "turboquant", "bits": 4}]},
    "KIVI-4": {"cache": [{"pass": "kivi", "bits": 4, "group": 32, "recent": 0}]},
    "int2 Hadamard": {"fold": HADAMARD, "cache": [{"pass": "quantize_kv", "format": "int2", "symmetric": False}]},
    "KIVI-2": {"cache": [{"pass": "kivi", "bits": 2, "group": 32, "recent": 0}]},
}


def model(head_dim: int, outliers: int) -> CausalLM:
    """One layer of attention with random weights; `outliers` channels of each kv head have a mean of MEAN."""
    attention = Attention(
        D, heads=HEADS, kv_heads=KV_HEADS, head_dim=head_dim, rope=Rope(theta=1e6, dim=head_dim), bias=True
    )
    block = Block(norm=RMSNorm(D), mixer=attention, mlp_norm=RMSNorm(D), mlp=GatedMLP(D, D))
    tree = ir.init_weights(
        CausalLM(embed=Embed(256, D), layers=[block], norm=RMSNorm(D), head=None, context=TOKENS), seed=0
    )
    mixer = tree.layers[0].mixer
    draw = np.random.default_rng(0)
    for part in (mixer.q, mixer.k, mixer.v, mixer.o):
        part.weight.set_value(jnp.asarray(draw.normal(0, D**-0.5, part.weight.shape), jnp.float32))
    half = head_dim // 2
    slowest = [half - 1 - i for i in range(outliers // 2)] + [head_dim - 1 - i for i in range(outliers // 2)]
    bias = np.zeros((KV_HEADS, head_dim), np.float32)
    bias[:, slowest] = MEAN * draw.choice([-1, 1], (KV_HEADS, len(slowest)))
    mixer.k.bias.set_value(jnp.asarray(bias.reshape(-1)))
    mixer.q.weight.set_value(PEAK * mixer.q.weight.get_value())
    return tree


def output(tree: CausalLM, x: jax.Array) -> jax.Array:
    """Of the attention layer for tokens x [T, D], over keys and values as a cache gives them back."""
    return tree.layers[0].mixer(x, Ragged.dense(1, TOKENS), None)[0]


def errors(head_dim: int, outliers: int) -> dict[str, float]:
    """Format -> relative error of the layer's output."""
    x = jax.random.normal(jax.random.key(1), (TOKENS, D))
    tree = model(head_dim, outliers)
    want = output(tree, x)
    found = {}
    for name, stages in FORMATS.items():
        recipe = Recipe.from_dict({"name": name, "allow": ["gqa_kivi2", "k_bias_low_bit_kv"], **stages})
        got = output(optx.compile(tree, recipe).tree, x)
        found[name] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder in which kv_head_dims.md is written")
    args = parser.parse_args()
    columns = [(dim, count) for count in (OUTLIERS, 0) for dim in (64, 128)]
    found = [errors(*column) for column in columns]
    header = ("format", *(f"{dim} dims, {f'{count} outliers' if count else 'none'}" for dim, count in columns))
    rows = [[name, *(f"{100 * column[name]:.2f}%" for column in found)] for name in FORMATS]
    print(table(header, rows))
    if args.out:
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        (args.out / "kv_head_dims.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
