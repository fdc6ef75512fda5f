"""Whole models on the running device: lowered to its kernels against lowered to plain XLA, on random weights.

Logits are taken three ways: of whole sequences, of a prefill chunk over pages, of decoding one and several tokens.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import optx
from optx.bench.step import random_weights
from optx.bench.timing import relative_error
from optx.cache import Address, Caches, Layout, Ragged
from optx.lower import Program
from optx.recipe import Recipe

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# Codes of 4 bits: a key rounded to 16 bits before it gets its code tips some codes to the next one (`cases.rotate_append`).
TIPPED = {"kv_int4": 5e-2, "kv_kivi4": 5e-2}
RECIPES = (None, "fused", "int8_kv8", "int4_kv8", "fp8_kv8", "sliding", *TIPPED)
CHUNKS = (128, 8, 1, 1, 40, 1)  # tokens a tick, in order
TOLERANCE = 2e-2  # else, of bfloat16 activations through two layers, added up in another order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One recipe: relative error of the logits of each way."""

    recipe: str
    whole: float
    paged: float
    kernels: int  # call sites that run a kernel of the device

    @property
    def worst(self) -> float:
        return max(self.whole, self.paged) if self.whole == self.whole else self.whole


def paged_logits(program: Program, tokens: np.ndarray) -> jax.Array:
    """Logits [T, V] of one sequence that comes in ticks of CHUNKS tokens, its pages in descending order."""
    layout = Layout(pages=8, page_size=64, slots=1)
    caches, out, start = program.plan.init(layout), [], 0
    groups = len(program.plan.keys)
    listed = np.arange(8)[::-1].astype(np.int32)
    step = jax.jit(lambda leaves, *args: _tick(program.merge(leaves), *args))
    for size in CHUNKS:
        at = np.arange(start, start + size, dtype=np.int32)
        ragged = dataclasses.replace(Ragged.dense(1, size), positions=jnp.asarray(at))
        address = Address(
            tables=(jnp.asarray(listed[None, None]),) * groups,
            lengths=(jnp.full((1, 1), start + size, jnp.int32),) * groups,
            writes=(jnp.asarray(listed[at // 64] * 64 + at % 64),) * groups,
            slots=jnp.zeros(1, jnp.int32),
        )
        logits, caches = step(program.leaves, jnp.asarray(tokens[at]), ragged, caches, address)
        out.append(logits)
        start += size
    return jnp.concatenate(out)


def _tick(model, tokens, ragged, caches: Caches, address: Address):
    hidden, caches, _ = model.backbone(tokens, ragged, caches, address)
    return model.head(hidden), caches


def compare(recipe: str | None, seed: int = 0) -> Compared:
    """The small model under a recipe, for the running device and in plain XLA."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(QWEN))
        model = random_weights(optx.load_config(path, "bfloat16").tree, seed)
    chosen = Recipe.from_yaml(recipe) if recipe else Recipe(name="none")
    ours = optx.compile(model, chosen)
    plain = optx.compile(model, dataclasses.replace(chosen, require="xla"))
    tokens = np.random.default_rng(seed).integers(0, QWEN["vocab_size"], sum(CHUNKS)).astype(np.int32)
    return Compared(
        recipe=recipe or "none",
        whole=relative_error(ours.logits(tokens[None]), plain.logits(tokens[None])),
        paged=relative_error(paged_logits(ours.program, tokens), paged_logits(plain.program, tokens)),
        kernels=sum(choice.backend != "xla" for _, choice in optx.lower.choices(ours.tree)),
    )
