"""Mixture of experts against loops over tokens and experts; loads and how they even out; packed experts; work done."""

import json
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optx
from optx import formats, ir, lower, tensor
from optx.cache import Ragged
from optx.checkpoint.config import Fields
from optx.errors import ConfigError
from optx.models import qwen3_moe
from optx.nn import Experts, GatedMLP, Glu, Linear, MoE, Router
from optx.nn.moe import balance_loss, balanced_bias, load, recorded
from optx.pallas.grouped_matmul import reference
from optx.recipe import Recipe

D, E, F, T = 16, 8, 12, 23


def drawn(module, seed=0, scale=2.0):
    return ir.init_weights(module, seed, scale)


def tokens(count=T, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, D)), jnp.float32)


def array(variable):
    return np.asarray(variable.get_value(), np.float64)


def routed(router: Router, x) -> list[dict[int, float]]:
    """For each token the weight of each chosen expert, by the definition."""
    chosen = []
    for token in np.asarray(x, np.float64):
        logits = token @ array(router.weight) + (0 if router.bias is None else array(router.bias))
        scores = np.exp(logits - logits.max())
        scores = scores / scores.sum() if router.score == "softmax" else 1 / (1 + np.exp(-logits))
        choice = scores + (0 if router.selection_bias is None else array(router.selection_bias))
        size = router.experts // router.groups
        worth = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(router.groups)}
        kept = sorted(worth, key=worth.get)[-router.kept :]
        allowed = [e for e in range(router.experts) if e // size in kept]
        best = sorted(allowed, key=lambda e: choice[e])[-router.top_k :]
        total = sum(scores[e] for e in best) if router.normalized else 1
        chosen.append({e: router.scale * scores[e] / total for e in best})
    return chosen


ROUTERS = {
    "softmax": {},
    "unnormalized": {"normalized": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid_unnormalized": {"score": "sigmoid", "normalized": False, "scale": 2.5},
    "bias": {"bias": True, "top_k": 1},
    "selection_bias": {"score": "sigmoid", "selection_bias": True, "scale": 1.8},
    "groups": {"groups": 4, "kept": 2},
    "all": {"score": "sigmoid", "bias": True, "selection_bias": True, "groups": 2, "kept": 1, "top_k": 4},
    "every_expert": {"top_k": E},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name):
    router = drawn(Router(D, E, **{"top_k": 3, **ROUTERS[name]}))
    routing = router(tokens())
    want = routed(router, tokens())
    for experts, weights, expected in zip(np.asarray(routing.experts), np.asarray(routing.weights), want, strict=True):
        assert sorted(experts) == sorted(expected)
        np.testing.assert_allclose(weights, [expected[int(e)] for e in experts], rtol=1e-5)
    assert routing.scores.shape == (T, E) and routing.scores.dtype == routing.weights.dtype == jnp.float32


def test_a_selection_bias_chooses_and_does_not_weigh():
    router = drawn(Router(D, E, top_k=2, score="sigmoid", normalized=False, selection_bias=True))
    router = ir.replace(router, selection_bias=jnp.zeros(E).at[5].set(100.0))
    routing = router(tokens())
    assert (np.asarray(routing.experts) == 5).any(1).all()
    assert float(routing.weights.max()) <= 1


@pytest.mark.parametrize(
    "options", [{"top_k": 9}, {"top_k": 0}, {"top_k": 2, "groups": 3}, {"top_k": 5, "groups": 4, "kept": 2}]
)
def test_routers_that_do_not_work_out(options):
    with pytest.raises(ConfigError, match="does not work out"):
        Router(D, E, **options)


def by_loop(moe: MoE, x) -> np.ndarray:
    """Every chosen expert of every token run alone, in float64."""
    experts, glu = moe.experts, moe.experts.glu
    wide, down = experts.gate_up if experts.gated else experts.up, experts.down

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def linear(part, e, x):
        weight = np.asarray(tensor.dense(part.weight.get_value()), np.float64)[e]
        return x @ weight + (0 if part.bias is None else array(part.bias)[e])

    def expert(e, x):
        y = linear(wide, e, x)
        if not experts.gated:
            return linear(down, e, np.maximum(y, 0))
        gate, up = np.split(y, 2)
        if glu.limit is not None:
            gate, up = np.minimum(gate, glu.limit), np.clip(up, -glu.limit, glu.limit)
        return linear(down, e, gate * sigmoid(glu.slope * gate) * (up + glu.shift))

    chosen = routed(moe.router, x)
    out = [sum(w * expert(e, t) for e, w in picks.items()) for t, picks in zip(np.asarray(x), chosen, strict=True)]
    if moe.shared is not None:
        for t, token in enumerate(np.asarray(x, np.float64)):
            gate, up = token @ array(moe.shared.gate.weight), token @ array(moe.shared.up.weight)
            y = (gate * sigmoid(gate) * up) @ array(moe.shared.down.weight)
            out[t] = out[t] + y * (1 if moe.shared_gate is None else sigmoid(token @ array(moe.shared_gate.weight)))
    return np.asarray(out)


MIXTURES = {
    "plain": ({}, {}),
    "bias": ({"bias": True}, {}),
    "clamped": ({"bias": True, "glu": Glu(limit=0.7, slope=1.702, shift=1.0)}, {}),
    "ungated": ({"gated": False, "glu": Glu(activation="relu")}, {}),
    "shared": ({}, {"shared": lambda: GatedMLP(D, 20)}),
    "gated_shared": ({}, {"shared": lambda: GatedMLP(D, 20), "shared_gate": lambda: Linear(D, 1)}),
}


def mixture(name="plain", top_k=3, experts=E):
    options, more = MIXTURES[name]
    more = {key: make() for key, make in more.items()}
    return drawn(MoE(Router(D, experts, top_k=top_k), Experts(experts, D, F, **options), **more))


def run(moe: MoE, x) -> np.ndarray:
    return np.asarray(jax.jit(lambda x: moe(x))(x))


@pytest.mark.parametrize("count", [1, T])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_against_a_loop_over_experts(name, count):
    moe, x = mixture(name), tokens(count)
    assert families.relative(run(moe, x), by_loop(moe, x)) < 1e-5


def test_a_token_without_numbers_harms_no_other():
    moe, x = mixture("shared"), tokens()
    broken = run(moe, x.at[4].set(jnp.nan))
    kept = np.arange(T) != 4
    np.testing.assert_allclose(broken[kept], run(moe, x)[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["int8", "int4_g4", "int4_asym", "fp8_e4m3"])
def test_packed_experts(text):
    """What a packed expert gives is what its dequantized weights give."""
    moe, x = mixture("bias"), tokens()
    pack = lambda part: ir.replace(part, weight=tensor.quantize(part.weight.get_value(), formats.parse(text)))  # noqa: E731
    experts = ir.replace(moe.experts, gate_up=pack(moe.experts.gate_up), down=pack(moe.experts.down))
    packed = ir.replace(moe, experts=experts)
    assert families.relative(run(packed, x), by_loop(packed, x)) < 1e-5
    assert 1e-4 < families.relative(by_loop(packed, x), by_loop(moe, x)) < 0.3


# A model's loads.

GOLDEN = Path(__file__).parent / "goldens" / "qwen3_moe"


def test_loads_of_a_model_inside_jit():
    """Padding is routed but not counted: loads are those of each row alone, whatever the padding is."""
    model = optx.load(str(GOLDEN), dtype="float32").load()
    top_k, ids = 3, np.random.default_rng(3).integers(0, 96, (3, 8)).astype(np.int32)
    counts = np.asarray([8, 0, 3], np.int32)
    graph, state = nnx.split(model)

    @jax.jit
    def loads(state, ids, counts):
        with recorded() as routings:
            nnx.merge(graph, state)(ids, counts)
        valid = Ragged.dense(*ids.shape, counts).valid.reshape(-1)
        return jnp.stack([load(routing, valid) for routing in routings])

    found = loads(state, ids, counts)
    assert found.shape == (2, 8), "two of the three layers have experts"
    np.testing.assert_array_equal(found.sum(1), top_k * counts.sum())
    filled = np.where(np.arange(8) < counts[:, None], ids, 95)
    alone = [loads(state, filled, np.where(np.arange(3) == row, counts, 0)) for row in range(3)]
    np.testing.assert_array_equal(found, sum(alone))
    assert not alone[1].any()
    with recorded() as outside:
        pass
    assert not outside


# A collapsed router.


def collapsed(**options) -> Router:
    """Nearly every token goes to expert 0."""
    router = drawn(Router(D, E, bias=True, **{"top_k": 1, **options}), scale=0.5)
    return ir.replace(router, bias=jnp.zeros(E).at[0].set(4.0))


def busiest(loads) -> float:
    """Load of the busiest expert over the mean, 1 when even."""
    return float(loads.max() / loads.mean())


def test_balance_loss():
    even = Router(E, E, top_k=1, normalized=False)
    even = ir.replace(even, weight=10 * jnp.eye(E))
    assert float(balance_loss(even(jnp.eye(E)))) == pytest.approx(1)
    one = jnp.tile(jnp.eye(E)[:1], (5, 1))
    assert float(balance_loss(even(one))) == pytest.approx(E, rel=1e-2)
    valid = jnp.arange(E + 5) < E
    padded = even(jnp.concatenate([jnp.eye(E), one]))
    assert float(balance_loss(padded, valid)) == pytest.approx(1)
    np.testing.assert_array_equal(load(padded, valid), np.ones(E))
    sigmoid = ir.replace(even, score="sigmoid")
    assert float(balance_loss(sigmoid(jnp.eye(E)))) == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "top_k": 2}])
def test_a_collapsed_router_recovers_by_training(options):
    router, x = collapsed(**options), tokens(256)
    graph, state = nnx.split(router)
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(state, kept):
        loss, slope = jax.value_and_grad(lambda state: balance_loss(nnx.merge(graph, state)(x)))(state)
        updates, kept = optimizer.update(slope, kept, state)
        return optax.apply_updates(state, updates), kept, loss

    kept, losses = optimizer.init(state), []
    for _ in range(300):
        state, kept, loss = step(state, kept)
        losses.append(float(loss))
    before, after = load(router(x)), load(nnx.merge(graph, state)(x))
    assert busiest(before) > E / options.get("top_k", 1) * 0.9 and busiest(after) < 1.5
    assert losses[0] > 1.15 * losses[-1] and losses[-1] == pytest.approx(1, abs=0.05)
    assert np.asarray(after).min() > 0


def test_a_collapsed_router_recovers_by_its_selection_bias():
    router, x = collapsed(score="sigmoid", selection_bias=True, top_k=2), tokens(256)
    router = ir.replace(router, selection_bias=jnp.zeros(E))
    before = load(router(x))
    for _ in range(300):
        bias = balanced_bias(router.selection_bias.get_value(), load(router(x)), rate=5e-3)
        router = ir.replace(router, selection_bias=bias)
    after = load(router(x))
    assert busiest(before) > 3.5 and busiest(after) < 1.2
    assert float(after.sum()) == 2 * 256


# Work.


@pytest.mark.parametrize("experts", [8, 64, 512])
def test_the_work_of_a_token_does_not_grow_with_the_experts(experts, monkeypatch):
    """Expert matrices that one token touches, and rows that meet them, counted as they run."""
    touched, rows, product_with = [], [], reference._product_with

    def counted(w, expert):
        jax.debug.callback(lambda e: touched.append(int(e)), expert)
        product = product_with(w, expert)

        def run(x):
            jax.debug.callback(lambda: rows.append(x.shape[0]))
            return product(x)

        return run

    monkeypatch.setattr(reference, "_product_with", counted)
    moe = mixture(top_k=2, experts=experts)
    jax.block_until_ready(jax.jit(lambda x: moe(x))(tokens(1)))
    jax.effects_barrier()
    chosen = np.asarray(moe.router(tokens(1)).experts)[0]
    assert sorted(touched) == sorted([*chosen, *chosen]), "gate_up and down of each chosen expert, once"
    assert rows == [8] * 4


# Compiled.

WIDE = {
    "num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
def test_packed_experts_lie_as_their_kernel_reads_them_and_come_back(packed):
    config = json.loads((GOLDEN / "config.json").read_text()) | WIDE | {"num_local_experts": 4, "mlp_only_layers": []}
    model = ir.init_weights(qwen3_moe.from_hf(Fields(config, "test"), "bfloat16"))
    rule = {"pass": "quantize_weights", "format": "int4", "group": 64, "match": ".*/experts/.*"}
    recipe = Recipe.from_dict({"name": "experts", "weights": [rule]}) if packed else None
    here, there = (optx.compile(model, recipe, target=target) for target in ("cpu", "h100"))
    found = {path: v.get_value() for path, v in ir.params(there.tree).items() if "/experts/" in path}
    assert len(found) == 2 and all(isinstance(value, tensor.Arranged) == packed for value in found.values())
    assert ("re-laid" in there.explain()) == packed
    for path, variable in ir.params(lower.canonical(there.tree)).items():
        mine = ir.get(here.tree, path).get_value()
        assert jax.tree.all(jax.tree.map(np.array_equal, mine, variable.get_value())), path
