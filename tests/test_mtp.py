"""The draft module of multi-token prediction against a float64 transcription of its equations, from files and over caches."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import optx
from optx import ir, tensor
from optx.bench.timing import relative_error
from optx.cache import Layout, Ragged, View
from optx.checkpoint.config import Fields
from optx.configs import model_path
from optx.errors import CheckpointError
from optx.models import deepseek_v3
from optx.passes.quantize_weights import QuantizeWeights
from optx.recipe import Recipe

GOLDEN = Path(__file__).parent / "goldens" / "deepseek_v3"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
DRAFT = f"model.layers.{CONFIG['num_hidden_layers']}."
LENGTH = 11


def draw(rng) -> dict[str, np.ndarray]:
    """The module's tensors as checkpoints hold them: an expert block's, and those around it."""
    main = load_file(GOLDEN / "model.safetensors")
    block = f"model.layers.{CONFIG['num_hidden_layers'] - 1}."
    shapes = {name.replace(block, DRAFT): x.shape for name, x in main.items() if name.startswith(block)}
    d = CONFIG["hidden_size"]
    shapes |= {f"{DRAFT}{name}.weight": (d,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{DRAFT}eh_proj.weight": (d, 2 * d)}
    drawn = {n: rng.normal(size=s) * (s[-1] ** -0.5 if len(s) > 1 else 0.3) + (len(s) == 1) for n, s in shapes.items()}
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The golden checkpoint with `tensors`, and copies of embedding and head as published checkpoints have them."""
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    main = {name: np.asarray(x, np.float32) for name, x in load_file(GOLDEN / "model.safetensors").items()}
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    copies = {DRAFT + name: main[of].copy() for name, of in copies.items() if tensors}
    save_file({**main, **tensors, **copies}, folder / "model.safetensors")
    return folder


@pytest.fixture
def files(tmp_path, rng):
    tensors = draw(rng)
    return write(tmp_path / "model", tensors), tensors


def literal(w: dict[str, np.ndarray], hidden: np.ndarray, embedded: np.ndarray) -> np.ndarray:
    """hidden and embedded [T, D] -> [T, D]: eq. 21 to 23 of arXiv:2412.19437 around a block, all in float64."""
    w = {name.removeprefix(DRAFT): x.astype(np.float64) for name, x in w.items()}
    eps = CONFIG["rms_norm_eps"]
    joined = np.concatenate([rms(embedded, w["enorm.weight"], eps), rms(hidden, w["hnorm.weight"], eps)], axis=-1)
    x = joined @ w["eh_proj.weight"].T
    x = x + attention(w, rms(x, w["input_layernorm.weight"], eps))
    x = x + experts(w, rms(x, w["post_attention_layernorm.weight"], eps))
    return rms(x, w["shared_head.norm.weight"], eps)


def rms(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def attention(w, x):
    """MLA, arXiv:2405.04434, eq. 37 to 47, with its queries' and keys' biases."""
    heads, nope, dim = CONFIG["num_attention_heads"], CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"]

    def linear(name, x):
        bias = w.get(f"self_attn.{name}.bias", 0.0)
        return x @ w[f"self_attn.{name}.weight"].T + bias

    q = linear("q_b_proj", rms(linear("q_a_proj", x), w["self_attn.q_a_layernorm.weight"])).reshape(len(x), heads, -1)
    low, k_rope = np.split(linear("kv_a_proj_with_mqa", x), [CONFIG["kv_lora_rank"]], axis=-1)
    kv = linear("kv_b_proj", rms(low, w["self_attn.kv_a_layernorm.weight"])).reshape(len(x), heads, -1)
    q = np.concatenate([q[..., :nope], rotate(q[..., nope:])], axis=-1)
    k = np.concatenate([kv[..., :nope], np.repeat(rotate(k_rope[:, None]), heads, axis=1)], axis=-1)
    rope = CONFIG["rope_parameters"]
    sharper = 0.1 * rope["mscale_all_dim"] * np.log(rope["factor"]) + 1
    logits = np.einsum("qnh,snh->nqs", q, k) * (nope + dim) ** -0.5 * sharper**2
    weights = np.where(np.tri(len(x), dtype=bool), np.exp(logits), 0)
    out = np.einsum("nqs,snh->qnh", weights / weights.sum(-1, keepdims=True), kv[..., nope:])
    return linear("o_proj", out.reshape(len(x), -1))


def rotate(x):
    """x [T, N, Hr]: pairs (2i, 2i + 1) turned by YaRN's angles (arXiv:2309.00071, section 3.2 and eq. 22)."""
    rope, dim = CONFIG["rope_parameters"], x.shape[-1]
    freq = rope["rope_theta"] ** (-np.arange(dim // 2) / (dim // 2))
    turns = lambda n: dim * np.log(rope["original_max_position_embeddings"] / (2 * np.pi * n)) / 2  # noqa: E731
    low, high = (turns(rope[key]) / np.log(rope["rope_theta"]) for key in ("beta_fast", "beta_slow"))
    low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    angle = np.arange(len(x))[:, None] * (freq / rope["factor"] * divided + freq * (1 - divided))
    grown = (0.1 * rope["mscale"] * np.log(rope["factor"]) + 1) / (
        0.1 * rope["mscale_all_dim"] * np.log(rope["factor"]) + 1
    )
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * (grown * np.exp(1j * angle))[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def experts(w, x):
    """The best experts of the best groups by biased sigmoid scores (arXiv:2412.19437, eq. 12 to 16), and the shared ones."""
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731

    def mlp(name, x):
        gate, up, down = (w[f"mlp.{name}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        return (silu(x @ gate) * (x @ up)) @ down

    scores = 1 / (1 + np.exp(-x @ w["mlp.gate.weight"].T))
    choice = (scores + w["mlp.gate.e_score_correction_bias"]).reshape(len(x), CONFIG["n_group"], -1)
    worth = np.sort(choice, axis=-1)[..., -2:].sum(-1)
    floor = np.sort(worth, axis=-1)[:, -CONFIG["topk_group"], None]
    choice = np.where((worth >= floor)[..., None], choice, -np.inf).reshape(scores.shape)
    y = mlp("shared_experts", x)
    for t in range(len(x)):
        best = np.argsort(-choice[t])[: CONFIG["num_experts_per_tok"]]
        share = scores[t, best] / scores[t, best].sum() * CONFIG["routed_scaling_factor"]
        y[t] += sum(s * mlp(f"experts.{e}", x[t]) for s, e in zip(share, best, strict=True))
    return y


def inputs(tree, rng):
    """Token ids [T + 1] -> (the model's hidden states [T, D], the next tokens' embeddings [T, D])."""
    tokens = jnp.asarray(rng.integers(0, CONFIG["vocab_size"], LENGTH + 1), jnp.int32)
    hidden, _, _ = jax.jit(lambda ids: tree.backbone(ids, Ragged.dense(1, LENGTH)))(tokens[:-1])
    return hidden, tree.embed(tokens[1:])


def drafted(tree, hidden, embedded, ragged=None, view=None):
    """view: fields of a View, or None. -> (hidden states [T, D], the block's pool)."""
    ragged = ragged or Ragged.dense(1, LENGTH)
    return jax.jit(lambda *args, view: tree.draft(*args, view and View(**view)))(hidden, embedded, ragged, view=view)


def test_equals_its_equations(files, rng):
    folder, tensors = files
    tree = optx.load(folder, dtype="float32").load()
    hidden, embedded = inputs(tree, rng)
    found, _ = drafted(tree, hidden, embedded)
    want = literal(tensors, *(np.asarray(x, np.float64) for x in (hidden, embedded)))
    assert relative_error(found, want) < 1e-5
    assert relative_error(found, literal(tensors, *(np.asarray(x, np.float64) for x in (embedded, hidden)))) > 0.1


def test_over_its_own_cache(files, rng):
    """Two chunks over pages give what one forward gives."""
    tree = optx.load(files[0], dtype="float32").load()
    hidden, embedded = inputs(tree, rng)
    want, _ = drafted(tree, hidden, embedded)
    layout, at = Layout(pages=4, page_size=4, slots=1), jnp.arange(LENGTH, dtype=jnp.int32)
    pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree.draft.cache.init(layout))
    positions = jnp.arange(20, dtype=jnp.int32).reshape(5, 4)
    got = []
    for first, last in ((0, 6), (6, LENGTH)):
        count = last - first
        one = {"rows": jnp.zeros(count, jnp.int32), "starts": jnp.zeros(1, jnp.int32), "counts": jnp.asarray([count])}
        ragged = Ragged(**one, positions=at[first:last], longest=count)
        view = {
            "pool": pool, "slots": jnp.zeros(1, jnp.int32), "positions": positions, "table": at[None, None, :4],
            "lengths": jnp.asarray([[last]]), "writes": at[first:last],
        }  # fmt: skip
        out, pool = drafted(tree, hidden[first:last], embedded[first:last], ragged, view)
        got.append(out)
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-5)


def test_the_forward_leaves_it_out(files):
    tokens = np.load(GOLDEN / "answers.npz")["tokens"][:, :9]
    with_draft, without = (optx.load(folder, dtype="float32") for folder in (files[0], GOLDEN))
    assert with_draft.tree.draft is not None and without.tree.draft is None
    logits = (jax.jit(source.load())(jnp.asarray(tokens)) for source in (with_draft, without))
    np.testing.assert_array_equal(*logits)


def test_exports_keep_it(files, tmp_path, rng):
    model = optx.compile(files[0], Recipe(weights=[QuantizeWeights(format="int8")]))
    optx.export(model, tmp_path / "packed")
    again = optx.load(tmp_path / "packed").load()
    assert ir.describe(again.draft) == ir.describe(model.tree.draft)
    assert tensor.is_packed(again.draft.join.weight.get_value())
    optx.export(optx.compile(optx.load(files[0], dtype="float32")), tmp_path / "dense", format="hf")
    found = load_file(tmp_path / "dense" / "model.safetensors")
    for name, x in files[1].items():
        np.testing.assert_array_equal(found[name], x)


def test_a_part_of_it_is_no_module(tmp_path, rng):
    tensors = draw(rng)
    del tensors[f"{DRAFT}eh_proj.weight"]
    with pytest.raises(CheckpointError, match="eh_proj"):
        optx.load(write(tmp_path / "model", tensors))


def test_published_size():
    """Beside the 671 B, 11.5 B in a block and 0.1 B that join its inputs."""
    config = json.loads(Path(model_path("deepseek-v3")).read_text())
    draft = deepseek_v3.from_hf(Fields(config, "deepseek-v3"), "bfloat16").draft
    assert (ir.weight_count(draft), ir.active_count(draft)) == (11_610_068_224, 688_100_608)
