"""mla: exact at full rank on every family, equal to partial-RoPE references, bytes as claimed, refusals with numbers."""

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest
from test_turboquant import NAMES, shapes

import optx
from optx import ir, pipeline
from optx.cache import Ragged
from optx.errors import LegalityError, OptxError, PassError
from optx.legality import Guard
from optx.nn import Attention
from optx.nn.core import Linear
from optx.nn.grouped_mla import GroupedMLA, PartialRope
from optx.passes.gqa import Gqa
from optx.passes.mla import Mla
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.rotate import Rotate
from optx.passes.smoothquant import SmoothQuant
from optx.recipe import Recipe


def untexted(model, **options):
    """The tree after a pass that reads no text."""
    recipe = Recipe(attention=[Mla(**options)])
    planned, records = pipeline.run(ir.abstract(model), recipe, [Guard(recipe)])
    out = ir.shallow(model)
    for prefix in (f"layers/{i}" for i in range(len(model.layers))):
        ir.put(out, prefix, pipeline.apply_block(ir.get(model, prefix), prefix, recipe, planned, records))
    return out


def through(model, text=None, **options):
    return calibrated.through(model, Recipe(attention=[Mla(**options)]), text)[0]


def converted(tree) -> list[GroupedMLA]:
    return [layer.mixer for layer in tree.layers if isinstance(layer.mixer, GroupedMLA)]


@pytest.mark.parametrize("family", NAMES)
def test_full_rank_is_exact_on_every_family(family):
    """Normed heads, biases, sinks, gates, windows, soft caps, no and partial and interleaved rotary embeddings, post-norms."""
    model = ir.init_weights(shapes(family), seed=1)
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 20)
    tree, want = untexted(model), families.forward(model, tokens)
    before = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    assert len(converted(tree)) == len(before)
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(families.incremental(tree, tokens, sizes=(7, 1)), want) < 1e-4
    for new, old in zip(converted(tree), before, strict=True):
        norms = 4 * old.kv_heads if old.k_norm is not None else 0
        assert new.cache.unit_bytes <= old.cache.unit_bytes + norms
        assert (new.key_norm is not None) == bool(norms)


@pytest.mark.parametrize("out_of", ["k", "v"])
def test_biases_of_either_projection(out_of):
    model = ir.shallow(families.concrete("llama", head_dim=16))
    for layer in model.layers:
        part = getattr(layer.mixer, out_of)
        width = part.weight.get_value().shape[1]
        biased = Linear(32, width, bias=True)
        biased.weight.set_value(part.weight.get_value())
        biased.bias.set_value(jnp.linspace(-2, 2, width))
        layer.mixer = ir.replace(layer.mixer, **{out_of: biased})
    tokens = families.prompt(14)
    want = families.forward(model, tokens)
    assert families.relative(families.forward(untexted(model), tokens), want) < 1e-4
    # 2 heads of 12 + 16 numbers behind 32 inputs and a bias: a rank of 33 is full.
    tree = untexted(model, rope="2_norm", rope_dim=4, least="weights")
    assert {mixer.rank for mixer in converted(tree)} == {33}
    assert families.relative(families.forward(tree, tokens), families.forward(kept(model, tree), tokens)) < 1e-4


class Kept:
    """A rotary embedding that turns the pairs of a kv head whose frequency it kept, and no others."""

    rotation = None

    def __init__(self, rope, frequencies):
        self.rope, self.dim, self.attention_factor = rope, rope.dim, rope.attention_factor
        kept = np.isclose(rope.frequencies()[None, :, None], np.asarray(frequencies)[:, None, :]).any(-1)
        self.kept = np.concatenate([kept, kept, np.zeros((len(kept), 0), bool)], axis=1)
        self.keys = self

    def __call__(self, x, positions):
        kept = np.zeros((len(self.kept), x.shape[-1]), bool)
        kept[:, : self.kept.shape[1]] = self.kept
        turned = np.repeat(kept, x.shape[1] // len(kept), axis=0)
        return jnp.where(turned, self.rope(x, positions), self.rope(x, positions * 0))


def kept(model, tree):
    """The partial-RoPE reference: the model with positions taken out of the pairs that the conversion does not rotate."""
    out = ir.shallow(model)
    for layer, new in zip(out.layers, tree.layers, strict=True):
        if isinstance(new.mixer, GroupedMLA) and new.mixer.rope is not None:
            assert isinstance(new.mixer.rope, PartialRope)
            frequencies = new.mixer.rope.frequencies.get_value()
            assert frequencies.shape[0] == layer.mixer.kv_heads
            layer.mixer = ir.replace(layer.mixer, rope=Kept(layer.mixer.rope, frequencies))
    return out


@pytest.mark.parametrize("family", [name for name in NAMES if name not in ("bamba", "granitemoehybrid", "jamba")])
def test_few_frequencies_a_head_are_the_partial_rope_model(family):
    model = ir.init_weights(shapes(family), seed=1)
    ropes = [layer.mixer.rope for layer in model.layers if isinstance(layer.mixer, Attention)]
    if all(rope is None for rope in ropes):
        return
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 20)
    dim = min(4, max(rope.dim for rope in ropes if rope is not None) - 2)
    tree = untexted(model, rope="2_norm", rope_dim=dim, least="weights")
    want = families.forward(kept(model, tree), tokens)
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(want, families.forward(model, tokens)) > 1e-3


def test_the_frequencies_that_matter_stay():
    """Queries and keys of one pair made large in each kv head, another in each."""
    model = ir.shallow(families.concrete("llama", num_hidden_layers=1))
    attn, loud = model.layers[0].mixer, [1, 3]
    gain = np.ones((2, 8), np.float32)
    for head, pair in enumerate(loud):
        gain[head, [pair, pair + 4]] = 5
    by = {"q": np.repeat(gain, 2, axis=0).reshape(-1), "k": gain.reshape(-1)}
    parts = {
        name: ir.replace(part, weight=part.weight.get_value() * by[name])
        for name, part in (("q", attn.q), ("k", attn.k))
    }
    model.layers[0].mixer = ir.replace(attn, **parts)
    for tree in (
        untexted(model, rope="2_norm", rope_dim=2, least="weights"),
        through(model, rope="2_norm", rope_dim=2),
    ):
        frequencies = tree.layers[0].mixer.rope.frequencies.get_value()
        np.testing.assert_allclose(frequencies[:, 0], attn.rope.frequencies()[loud], rtol=1e-6)


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_rotated_key_is_the_model_of_principal_components(family, components):
    """Reference in complex numbers: of each frequency the projection P of all heads' keys on their first components turns with
    positions, the rest does not: logit = Re sum e^(i w (s - t)) q conj(P k) + q conj((1 - P) k)."""
    model = families.concrete("llama") if family == "llama" else ir.init_weights(shapes(family), seed=2)
    tokens = list(range(12))
    dim = components * model.layers[0].mixer.rope.dim
    tree = untexted(model, rope="pca", rope_dim=dim, least="weights")
    attn, new = model.layers[0].mixer, tree.layers[0].mixer
    assert new.slices == 1 and attn.rope.dim == attn.head_dim
    k_heads, d, shared = attn.kv_heads, attn.head_dim, attn.heads // attn.kv_heads
    x = model.layers[0].norm(model.embed(jnp.asarray(tokens)))
    got = np.asarray(_mixed(new, x), np.float64)
    q, k, v = (np.asarray(part, np.float64) for part in attn.project(x))
    weights = (
        np.concatenate([attn.k.weight.get_value(), _bias(attn.k)[None]]).astype(np.float64).reshape(-1, k_heads, d)
    )
    planes = lambda y: y[..., : d // 2] + 1j * y[..., d // 2 :]  # noqa: E731
    q, k, weights = planes(q), planes(k), planes(weights)
    apart = np.arange(len(x))[:, None] - np.arange(len(x))
    logits = np.zeros((attn.heads, len(x), len(x)))
    for i, frequency in enumerate(attn.rope.frequencies()):
        top = np.linalg.svd(weights[:, :, i])[2][:components].T
        turning = k[:, :, i] @ top.conj() @ top.T
        for head in range(attn.heads):
            for part, turns in ((turning, np.exp(1j * frequency * apart)), (k[:, :, i] - turning, 1)):
                logits[head] += np.real(turns * np.outer(q[:, head, i], part[:, head // shared].conj()))
    logits = np.where(apart >= 0, logits * attn.scale, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("nst,tnh->snh", p, np.repeat(v, shared, axis=1)).reshape(len(x), -1)
    want = out @ np.asarray(attn.o.weight.get_value(), np.float64)
    assert families.relative(got, want) < 1e-4


def _bias(linear):
    return np.zeros(linear.weight.get_value().shape[1]) if linear.bias is None else np.asarray(linear.bias.get_value())


def _mixed(mixer, x):
    return mixer(x, Ragged.dense(1, len(x)), None)[0]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_all_components_are_the_model_itself(family):
    """Also of normed heads, whose queries are mapped behind their norm."""
    model, tokens = families.concrete(family), families.prompt(20)
    dim = 2 * model.layers[0].mixer.head_dim
    tree = untexted(model, rope="pca", rope_dim=dim, least="weights")
    assert (tree.layers[0].mixer.query_map is not None) == (family != "llama")
    got = families.incremental(tree, tokens, sizes=(7, 1))
    assert families.relative(got, families.forward(model, tokens)) < 1e-4
    assert families.relative(families.forward(tree, tokens), families.forward(model, tokens)) < 1e-4


def test_folded_frequencies_turn_by_the_first():
    model = families.concrete("llama")
    mixer = untexted(model, rope="pca", rope_dim=4, least="weights").layers[0].mixer
    np.testing.assert_allclose(mixer.rope.frequencies.get_value()[0], model.layers[0].mixer.rope.frequencies()[::2])


CUTS = (0.25, 0.5)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "rope", [{"rope": "2_norm", "rope_dim": 2}, {"rope": "pca", "rope_dim": 4}], ids=["2_norm", "pca"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bytes_that_go_are_those_asked_for(family, rope, cut):
    model, tokens = families.concrete(family), families.prompt(16)
    tree = through(model, kv_cut=cut, **rope)
    before, after = model.cache_plan().unit_bytes, tree.cache_plan().unit_bytes
    whole_ranks = {mixer.rank for mixer in converted(tree)} == {32}  # as many as inputs: nothing is left to cut
    assert after <= (1 - cut) * before and (whole_ranks or after > (1 - cut) * before - 8 * len(model.layers))
    whole = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, sizes=(5, 1)), whole) < 1e-4


def test_attention_on_text_loses_less_than_weights():
    """Inputs on 6 directions of 32: the latent of text spends its numbers there."""
    model, tokens = families.concrete("llama", num_hidden_layers=1), families.prompt(40, seed=2)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(families.VOCAB, 6)) @ rng.normal(size=(6, 32)) + 0.05 * rng.normal(
        size=(families.VOCAB, 32)
    )
    model.embed = ir.replace(model.embed, table=jnp.asarray(table, jnp.float32))
    want, text = families.forward(model, tokens), calibrated.windows(model, 16, 32)
    lost = {}
    for least in ("weights", "keys_and_values", "attention"):
        tree = through(model, text, kv_cut=0.5, rope="2_norm", rope_dim=4, least=least)
        lost[least] = families.relative(families.forward(tree, tokens), families.forward(kept(model, tree), tokens))
    assert lost["attention"] < lost["weights"] and lost["keys_and_values"] < lost["weights"], lost
    assert np.isfinite(want).all()


def test_before_expected():
    planned = optx.plan(families.abstract("qwen3"), Recipe(attention=[Mla(kv_cut=0.25, rope="2_norm", rope_dim=4)]))
    lines = [line.strip() for line in ir.describe(planned.tree).splitlines() if "mixer" in line]
    assert lines == [
        "mixer: GroupedMLA heads=4 kv_heads=2 rank=32 slices=2 nope_dim=12 value_dim=16 scale=0.25 asked=16 "
        "cache=(latent float32)",
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("fold", [Rotate(), SmoothQuant()], ids=["rotate", "smoothquant"])
def test_folds_into_converted_layers_are_exact(family, fold):
    """All that reads the stream is known: q, the latent's projection, and the keys whose norm is cached."""
    model, tokens = families.concrete(family), families.prompt(16)
    tree, _ = calibrated.through(model, Recipe(attention=[Mla()], fold=[fold]))
    assert families.relative(families.forward(tree, tokens), families.forward(model, tokens)) < 1e-4


def test_pooled_heads_are_converted():
    model, tokens = families.concrete("llama"), families.prompt(16)
    pooled, _ = calibrated.through(model, Recipe(structure=[Gqa(kv_heads=1)]))
    both, _ = calibrated.through(model, Recipe(structure=[Gqa(kv_heads=1)], attention=[Mla()]))
    assert families.relative(families.forward(both, tokens), families.forward(pooled, tokens)) < 1e-4


@pytest.mark.parametrize("format_", ["int8", "int4"])
def test_latents_are_packed_and_norms_stay(format_):
    model, tokens = families.concrete("qwen3"), families.prompt(16)
    recipe = Recipe(attention=[Mla()], cache=[QuantizeKV(format=format_, recent=4, first=2)])
    tree, _ = calibrated.through(model, recipe)
    spec = tree.layers[0].mixer.cache
    assert spec.format_of(spec.streams[1]) is None and spec.packed
    whole = families.forward(tree, tokens)
    assert families.relative(whole, families.forward(model, tokens)) < (0.05 if format_ == "int8" else 0.5)
    assert families.relative(families.incremental(tree, tokens, sizes=(5, 1)), whole) < 1e-4


def test_the_engine_decodes_what_the_forward_says(tmp_path):
    path, _ = families.hf_dir(tmp_path / "m", "qwen3", add_bos=True)
    compiled = optx.compile(path, Recipe(attention=[Mla(rope="pca", least="weights")]), target="cpu")
    prompts = [[256, *families.prompt(n, seed=n)] for n in (9, 3)]
    for prompt, answer in zip(prompts, compiled.generate(prompts, optx.Sampling(max_tokens=5)), strict=True):
        seen = list(prompt)
        for token in answer:
            assert int(np.argmax(compiled.logits([seen])[0, -1])) == token
            seen.append(token)
    again = optx.compile(optx.load(optx.export(compiled, tmp_path / "out")), None, target="cpu")
    np.testing.assert_array_equal(again.logits([prompts[0]]), compiled.logits([prompts[0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, r"rank 17 beside 16 rotated numbers of 32 that are cached now; allowed: 1 to 16"),
        ({"rank": 0}, "rank 0 beside 16"),
        ({"rank": 4, "kv_cut": 0.5}, "rank 4 and kv_cut 0.5; allowed: one of them"),
        ({"kv_cut": 1.0}, "kv_cut 1; allowed: at least 0 and below 1"),
        ({"kv_cut": 0.5}, "kv_cut 0.5 leaves a rank of 0 beside 16"),
        ({"rope_dim": 4}, "rope_dim 4 with rope: all"),
        ({"rope": "2_norm", "rope_dim": 3}, "rope_dim 3; allowed: an even number, 2 to 8"),
        ({"rope": "2_norm", "rope_dim": 10}, "rope_dim 10; allowed"),
        ({"rope": "pca", "rope_dim": 6}, "rope_dim 6; allowed: an even number that divides 8"),
        ({"rope": "pca", "rope_dim": 24}, "rope_dim 24; allowed"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PassError, match=message):
        optx.plan(families.abstract("llama"), Recipe(attention=[Mla(**options)]))


def test_a_cache_that_another_layer_reads_stays():
    with pytest.raises(LegalityError, match="reads_other_heads"):
        optx.plan(ir.abstract(families.hybrid()), Recipe(attention=[Mla(match="layers/0/.*")]))


def test_calibration_text_is_asked_for():
    with pytest.raises(OptxError, match="inputs"):
        recipe = Recipe(attention=[Mla(kv_cut=0.25, rope="2_norm", rope_dim=2)])
        optx.compile(families.concrete("llama"), recipe, target="cpu")


@pytest.mark.parametrize("rope", ["pca", "2_norm"])
def test_numbers_that_no_query_asks_for(rope):
    """Gemma-3-270M has gains of 0 in its norms of queries: the error of such a key weighs nothing, and no map may be infinite."""
    model = ir.shallow(ir.init_weights(shapes("gemma3"), seed=1))
    for layer in model.layers:
        gain = layer.mixer.q_norm.weight.get_value()
        silent = [1, 1 + len(gain) // 2]  # a pair
        layer.mixer = ir.replace(
            layer.mixer, q_norm=ir.replace(layer.mixer.q_norm, weight=gain.at[jnp.array(silent)].set(-1))
        )
        assert (layer.mixer.q_norm.offset + layer.mixer.q_norm.weight.get_value())[1] == 0
    tree = through(model, rope=rope, kv_cut=0.3)
    assert len(converted(tree)) == len(model.layers)
    assert all(bool(jnp.isfinite(x.get_value()).all()) for x in ir.params(tree).values())
