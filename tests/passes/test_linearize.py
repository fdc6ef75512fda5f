"""linearize: recurrences that start from attention's weights, decoded step by step as over whole sequences, bytes as claimed."""

import itertools

import calibrated
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_turboquant import NAMES, shapes

import optx
from optx import ir
from optx.cache import Ragged
from optx.checkpoint.source import from_module
from optx.errors import LegalityError, PassError, RecipeError
from optx.nn import Attention, Mamba2
from optx.nn.delta import GatedDelta
from optx.nn.linear_attention import LinearAttention
from optx.passes import linear_fit
from optx.passes.linearize import BETA, EPS, SMALL, Linearize, linearize, started
from optx.passes.quantize_kv import QuantizeKV
from optx.passes.rotate import Rotate
from optx.passes.share_kv import ShareKV
from optx.passes.smoothquant import SmoothQuant
from optx.recipe import Recipe
from optx.registry import SeenBlock, Site
from optx.watch import watch

KINDS = {"mamba2": Mamba2, "gdn": GatedDelta, "lightning": LinearAttention}
TEXT = "A text that is long enough to be cut into a window or two of some tokens. " * 4


def through(model, *, text=None, **options):
    return calibrated.through(model, Recipe(attention=[Linearize(**options)]), text)[0]


def mixers(tree) -> list[str]:
    return [type(layer.mixer).__name__ for layer in tree.layers]


def plan(family="llama", count=4, **options):
    model = families.abstract(family, num_hidden_layers=count)
    return optx.plan(model, Recipe(attention=[Linearize(**options)]))


BEFORE = """\
layers/0-3: Block
mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
"""
EXPECTED = """\
layers/0-2: Block
mixer: GatedDelta conv_weight=f32[4, 96] dt_bias=f32[4] a_log=f32[4] heads=4 key_heads=4 head_dim=8 key_dim=8 cache=(state float32)
layers/3: Block
mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 rope=(rope 10000/8) cache=(paged float32)
"""  # noqa: E501


def test_before_expected():
    planned = plan(to="gdn", keep_every=4)
    wanted = ("layers/", "mixer:")
    lines = [[line.strip().partition("  #")[0] for line in ir.describe(tree).splitlines()] for tree in planned.trees]
    printed = ["".join(f"{line}\n" for line in each if line.startswith(wanted)) for each in lines]
    assert printed == [BEFORE, EXPECTED]


@pytest.mark.parametrize(
    ("family", "to"),
    [*zip(NAMES, itertools.cycle(KINDS)), ("llama", "mamba2"), ("llama", "lightning"), ("qwen3", "gdn")],
)
def test_steps_equal_whole_sequences_on_every_family(family, to):
    """Normed heads, biases, sinks, groups, soft caps, every rotary embedding; windows and gates stay as they are."""
    model = ir.init_weights(shapes(family), seed=1)
    attention = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    stay = [mixer for mixer in attention if mixer.cache.window is not None or mixer.gate is not None]
    if len(stay) == len(attention):
        with pytest.raises(PassError, match="has a window|has a sigmoid gate"):
            through(model, to=to)
        return
    tree, tokens = through(model, to=to), np.random.default_rng(0).integers(0, 100, 20)
    assert sum(isinstance(layer.mixer, Attention) for layer in tree.layers) == len(stay)
    assert all(
        type(new.mixer)
        is (KINDS[to] if isinstance(old.mixer, Attention) and old.mixer not in stay else type(old.mixer))
        for new, old in zip(tree.layers, model.layers, strict=True)
    )
    want = families.forward(tree, tokens)
    assert np.isfinite(want).all()
    assert families.relative(families.incremental(tree, tokens, sizes=(7, 1)), want) < 1e-4


def heads_of(attn, x):
    """float64[T, N, H] each: queries, keys and values without positions; of norms of heads the gains alone."""
    found = []
    for part, norm in ((attn.q, attn.q_norm), (attn.k, attn.k_norm), (attn.v, None)):
        y = np.asarray(x, np.float64) @ np.asarray(part.weight.get_value(), np.float64)
        y = y if part.bias is None else y + np.asarray(part.bias.get_value(), np.float64)
        y = y.reshape(len(x), -1, attn.head_dim)
        y = y if norm is None else y * (np.asarray(norm.weight.get_value(), np.float64) + norm.offset)
        found.append(np.repeat(y, attn.heads // y.shape[1], axis=1))
    return found


def rms_of(attn, i):
    """float64[N]: of heads of queries, keys or values where inputs are white noise."""
    d = attn.q.weight.get_value().shape[0]
    bias = heads_of(attn, np.zeros((1, d)))[i]
    weight = heads_of(attn, np.eye(d))[i] - bias
    return np.sqrt(((weight**2).sum(0) + bias[0] ** 2).mean(-1))


def said(to, q, k, v, rates):
    """float64[T, N, H]: what the heads bring, token by token, before their norm."""
    state, out = np.zeros((q.shape[1], q.shape[2], v.shape[2])), []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        state = state * np.exp(-rates)[:, None, None]
        if to == "gdn":
            q_t, k_t = (t / np.sqrt((t * t).sum(-1, keepdims=True) + 1e-6) for t in (q_t, k_t))
            held = np.einsum("nkv,nk->nv", state, k_t)
            state = state + np.einsum("nk,nv->nkv", k_t, (v_t - held) / (1 + np.exp(-BETA)))
            out.append(np.einsum("nkv,nk->nv", state, q_t) / q.shape[2] ** 0.5)
            continue
        write = v_t * rates[:, None] if to == "mamba2" else v_t
        state = state + np.einsum("nk,nv->nkv", k_t, write)
        out.append(np.einsum("nkv,nk->nv", state, q_t) + (SMALL**2 / 4 * q.shape[2] * v_t if to == "mamba2" else 0))
    return np.asarray(out)


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_the_start_is_the_recurrence_of_attentions_heads(family, to):
    """Against plain numpy, token by token: which head reads which, gains, biases, rates, norms, gates, W_o."""
    model = ir.init_weights(shapes("qwen2"), seed=1) if family == "qwen2" else families.concrete(family)
    attn, ragged = model.layers[0].mixer, Ragged.dense(1, 24)
    x = np.random.default_rng(0).standard_normal((24, attn.q.weight.get_value().shape[0]), np.float32)
    new = linearize(Site(path="layers/0/mixer", layers=2), attn, Linearize(to=to, fit=False))
    _, values = started(attn, ())
    rates = 2.0 ** (-8 * np.arange(1, attn.heads + 1) / attn.heads)
    q, k, v = heads_of(attn, x)
    lengths = [rms_of(attn, i) for i in range(3)]
    np.testing.assert_allclose(values, lengths[2], rtol=1e-5)
    small = [part * (SMALL / length)[:, None] for part, length in zip((q, k, v), lengths, strict=True)]
    if to == "lightning":
        small[0] = small[0] * -np.expm1(-rates)[:, None]
    y = said(to, *(part / (1 + np.exp(-part)) for part in small), rates)
    axes = (1, 2) if to == "lightning" else 2
    y = y / np.sqrt((y * y).mean(axes, keepdims=True) + EPS) * values[:, None]
    want = y.reshape(24, -1) @ np.asarray(attn.o.weight.get_value(), np.float64)
    assert families.relative(new(jnp.asarray(x), ragged, None)[0], want) < 1e-4


def calls(seed, count=2, rows=50, length=60, d=32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((count, rows * length, d)), jnp.float32)
    return tuple((part, Ragged.dense(rows, length), None) for part in x)


def converted(attn, to, seen, **options):
    site = Site(path="layers/0/mixer", layers=2, seen=SeenBlock(parts={}, inputs=seen))
    return linearize(site, attn, Linearize(to=to, **options))


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_fitted_output_is_nearer_to_attention(family, to):
    """On inputs that the fit did not see."""
    attn = families.concrete(family).layers[-1].mixer
    ((x, ragged, _),) = calls(1, count=1)
    want = attn(x, ragged, None)[0]
    fit, plain = (converted(attn, to, calls(0), fit=fit)(x, ragged, None)[0] for fit in (True, False))
    assert families.relative(fit, want) < min(0.98, families.relative(plain, want))


@pytest.mark.parametrize("to", KINDS)
def test_the_fit_is_the_ridge_regression(to):
    """Against least squares with rows that pull the weight to 0."""
    attn = families.concrete("llama").layers[0].mixer
    seen = calls(0)
    new, rows, said = converted(attn, to, seen), [], []
    for x, ragged, _ in seen:
        copy = ir.shallow(new)
        watch(copy, ["out"], lambda path, call, f: (rows.append(np.asarray(f, np.float64)), call(f))[1])
        copy(x, ragged, None)
        said.append(np.asarray(attn(x, ragged, None)[0], np.float64))
    f, y = np.concatenate(rows), np.concatenate(said)
    pull = np.sqrt(linear_fit.RIDGE * (f * f).sum() / f.shape[1])
    a = np.concatenate([np.c_[f, np.ones(len(f))], np.c_[pull * np.eye(f.shape[1]), np.zeros(f.shape[1])]])
    want = np.linalg.lstsq(a, np.concatenate([y, np.zeros((f.shape[1], y.shape[1]))]), rcond=None)[0]
    np.testing.assert_allclose(new.out.weight.get_value(), want[:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(new.out.bias.get_value(), want[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("to", KINDS)
def test_healing_reaches_every_parameter(to):
    """Gates, rates and convolutions start where nothing depends on the token, and still have gradients."""
    attn = families.concrete("llama").layers[0].mixer
    seen = calls(0, count=1)
    graph, state = nnx.split(converted(attn, to, seen))
    x, ragged, _ = seen[0]
    loss = lambda state: jnp.sum((nnx.merge(graph, state)(x, ragged, None)[0] - attn(x, ragged, None)[0]) ** 2)  # noqa: E731
    grads = jax.grad(loss)(state)
    dead = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not jnp.any(g != 0)]
    assert not dead, dead


@pytest.mark.parametrize("to", KINDS)
def test_bytes_are_those_claimed(to):
    """At 3:1 three quarters of what a token leaves behind go, and each converted layer has a state a row."""
    planned = plan(to=to, keep_every=4)
    before, after = (tree.cache_plan() for tree in (planned.trees[0], planned.tree))
    (record,) = planned.records
    channels = {"mamba2": 3 * 32, "gdn": 3 * 32, "lightning": 0}[to]
    state = 4 * (4 * 8 * 8 + 3 * channels)
    assert after.bytes(1, 1000) - after.bytes(1, 0) == (before.bytes(1, 1000) - before.bytes(1, 0)) / 4
    assert after.bytes(5, 0) == 5 * 3 * state and before.bytes(5, 0) == 0
    assert record.cache_bytes == (4 * 128, 128 + 3 * state)
    assert planned.tree.layers[0].mixer.cache.unit_bytes == state
    assert "KV 128 B/token, state" in ir.summary(planned.tree)


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, [1, 1, 1, 1]),
        ({"layers": (0, -1)}, [1, 0, 0, 1]),
        ({"keep_every": 2}, [1, 0, 1, 0]),
        ({"keep_every": 4, "match": "layers/[13]/.*"}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_which_layers(options, want):
    assert mixers(plan(to="mamba2", **options).tree) == ["Mamba2" if chosen else "Attention" for chosen in want]


def test_windows_stay():
    planned = plan("gemma3", count=3, to="gdn")
    assert mixers(planned.tree) == ["Attention", "Attention", "GatedDelta"]
    why = {f"layers/{i}/mixer": "has a window of 6, so its cache is bounded" for i in range(2)}
    assert planned.records[0].skipped == why


@pytest.mark.parametrize(
    "options, told",
    [
        ({"layers": (4,)}, r"linearize: layers \[4\]; allowed: -4..3, each once"),
        ({"keep_every": 0}, "linearize: keep_every 0; allowed: 1 to 2147483647"),
        ({"keep_every": 1}, "linearize changed nothing: one layer in 1 stays attention"),
    ],
    ids=str,
)
def test_wrong_options(options, told):
    with pytest.raises(PassError, match=told):
        plan(to="gdn", **options)


def test_what_is_refused():
    shared = Recipe(structure=[ShareKV(factor=2, align=False)], attention=[Linearize(to="gdn", layers=(0,))])
    with pytest.raises(LegalityError, match="reads_other_heads"):
        optx.plan(families.abstract("llama"), shared)
    with pytest.raises(RecipeError, match=r"linearize reads its inputs \(inputs\) on calibration text"):
        optx.compile(families.concrete("llama"), Recipe(attention=[Linearize(to="gdn")]))
    packed = Recipe(attention=[Linearize(to="gdn")], cache=[QuantizeKV()])
    with pytest.raises(LegalityError, match="no_token_cache"):
        optx.plan(families.abstract("llama"), packed)


def test_a_packed_cache_beside_states():
    """The format is the attention layers' own: a state has none."""
    recipe = Recipe(attention=[Linearize(to="mamba2", keep_every=2)], cache=[QuantizeKV()])
    tree, _ = calibrated.through(families.concrete("llama"), recipe)
    assert [str(layer.mixer.cache) for layer in tree.layers] == ["state float32", "paged int8"]
    tokens = families.prompt(16)
    assert families.relative(families.incremental(tree, tokens, sizes=(5, 1)), families.forward(tree, tokens)) < 0.02


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("fold", [Rotate(), SmoothQuant()], ids=["rotate", "smoothquant"])
def test_folds_into_converted_layers_are_exact(to, fold):
    model, tokens = families.concrete("qwen3"), families.prompt(16)
    plain, _ = calibrated.through(model, Recipe(attention=[Linearize(to=to, fit=False)]))
    tree, _ = calibrated.through(model, Recipe(attention=[Linearize(to=to, fit=False)], fold=[fold]))
    assert families.relative(families.forward(tree, tokens), families.forward(plain, tokens)) < 1e-4


@pytest.mark.parametrize("to", KINDS)
def test_the_engine_decodes_what_the_forward_says(tmp_path, to):
    path, _ = families.hf_dir(tmp_path / "m", "qwen3", add_bos=True)
    recipe = Recipe(attention=[Linearize(to=to, keep_every=2)])
    compiled = optx.compile(path, recipe, target="cpu", calibration=TEXT, measured=False)
    assert mixers(compiled.tree) == [KINDS[to].__name__, "Attention"]
    prompts = [[256, *families.prompt(n, seed=n)] for n in (9, 3)]
    for prompt, answer in zip(prompts, compiled.generate(prompts, optx.Sampling(max_tokens=5)), strict=True):
        seen = list(prompt)
        for token in answer:
            assert int(np.argmax(compiled.logits([seen])[0, -1])) == token
            seen.append(token)
    again = optx.compile(optx.load(optx.export(compiled, tmp_path / "out")), None, target="cpu")
    np.testing.assert_array_equal(again.logits([prompts[0]]), compiled.logits([prompts[0]]))


# Chosen by what is measured


def test_damage_is_the_divergence_of_one_converted_layer():
    """Against whole models with that layer alone converted by the pipeline."""
    model = families.concrete("llama", num_hidden_layers=3)
    text = calibrated.windows(model)
    rule = Linearize(to="gdn")
    found = linear_fit.damage(
        model,
        text,
        {i: f"layers/{i}/mixer" for i in (0, 2)},
        lambda path, attn, seen: linearize(Site(path=path, layers=3, seen=seen), attn, rule),
    )
    assert list(found) == [0, 2]
    for layer, got in found.items():
        tree = through(model, to="gdn", layers=(layer,), text=text[linear_fit.SCORED :])
        kl = []
        for tokens in text[: linear_fit.SCORED]:
            p, q = (np.asarray(jax.nn.log_softmax(families.forward(m, tokens[0])), np.float64) for m in (model, tree))
            kl.append((np.exp(p) * (p - q)).sum(-1).mean())
        assert got == pytest.approx(np.mean(kl), rel=1e-3) and got > 1e-4


@pytest.mark.parametrize("by", ["sensitivity", "mass"])
def test_layers_that_are_worth_most_stay(by):
    """As many as by place, so bytes are those planned."""
    source = from_module(families.concrete("llama", num_hidden_layers=4), "tiny", families.tokenizer())
    rule = Linearize(to="mamba2", keep_every=2, by=by)
    planned = optx.plan(source, Recipe(attention=(rule,)))
    assert mixers(planned.tree) == ["Mamba2", "Attention"] * 2
    assert "which ones, calibration text says" in str(planned.records[0].skipped)
    compiled = optx.compile(source, Recipe(attention=(rule,)), calibration=TEXT, measured=False)
    resolved = compiled.plan.recipe.attention[0]
    assert not resolved.unresolved and resolved.keep_every is None and len(resolved.layers) == 2
    assert [i for i, name in enumerate(mixers(compiled.tree)) if name == "Mamba2"] == list(resolved.layers)
    assert planned.tree.cache_plan().bytes(1, 100) == compiled.tree.cache_plan().bytes(1, 100)


def test_what_cannot_be_chosen():
    source = from_module(families.concrete("llama"), "tiny", families.tokenizer())
    with pytest.raises(RecipeError, match="linearize: what it leaves to be measured needs a text"):
        optx.compile(source, Recipe(attention=[Linearize(to="gdn", keep_every=2, by="sensitivity")]))
    with pytest.raises(PassError, match="give it, and no layers"):
        optx.compile(source, Recipe(attention=[Linearize(to="gdn", by="sensitivity")]), calibration=TEXT)
    shared, _ = calibrated.through(families.concrete("llama"), Recipe(structure=[ShareKV(factor=2, align=False)]))
    with pytest.raises(PassError, match="some read another's cache; take place"):
        linear_fit.damage(shared, calibrated.windows(shared), {}, None)


def test_sensitive_layers_of_a_real_model_are_not_those_by_place(smollm2_path, wikitext):
    source = optx.load(smollm2_path, dtype="float32")
    text = optx.quality.windows(
        wikitext.read_text(encoding="utf-8")[:8000], source, optx.recipe.Calibration(windows=6, context=96)
    )
    rule = Linearize(to="gdn", keep_every=4, by="sensitivity").resolved(source.load(), text)
    stays = sorted(set(range(30)) - set(rule.layers))
    assert len(stays) == 7 and stays != [3, 7, 11, 15, 19, 23, 27], stays
