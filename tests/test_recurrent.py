"""What recurrent mixers share: states at a step's start, the causal convolution, the gated norm; Mamba-2's options; the cost
of a decode step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optx import ir
from optx.bench.layer_cost import layer_cost
from optx.cache import CacheSpec, Layout, Ragged, Stream, View
from optx.nn import MLP, Attention, Block, Experts, Glu, LatentExperts, Mamba2, MoE, Residual, RMSNorm, Router
from optx.nn.recurrent import GatedRMSNorm, causal_conv, held_states
from optx.pallas.ssm_scan.reference import ssm_scan

D = 16


def ragged_of(counts, firsts=None, total=None, longest=None) -> Ragged:
    """Rows of `counts` tokens that start at positions `firsts`, one after the other, and padding up to `total`."""
    firsts = firsts or [0] * len(counts)
    padding = (total or sum(counts)) - sum(counts)
    rows = [row for row, count in enumerate(counts) for _ in range(count)] + [len(counts)] * padding
    positions = [first + i for first, count in zip(firsts, counts, strict=True) for i in range(count)] + [0] * padding
    ints = [jnp.asarray(x, jnp.int32) for x in (rows, np.cumsum([0, *counts[:-1]]), counts, positions)]
    return Ragged(rows=ints[0], starts=ints[1], counts=ints[2], positions=ints[3], longest=longest or max(counts))


def test_causal_conv_equals_its_sum_and_keeps_the_tail(rng):
    """Rows of 5, 2 and 0 tokens of 5 places; NaN past a row's tokens reaches nothing."""
    width, channels, counts = 4, 3, [5, 2, 0]
    x, tail = rng.normal(size=(3, 5, channels)), rng.normal(size=(3, width - 1, channels))
    weight, bias = rng.normal(size=(width, channels)), rng.normal(size=channels)
    spoiled = np.where(np.arange(5)[None, :, None] < np.array(counts)[:, None, None], x, np.nan)
    args = [jnp.asarray(a, jnp.float32) for a in (spoiled, tail, weight, bias)]
    y, new = causal_conv(*args, ragged_of(counts))
    for row, count in enumerate(counts):
        seen = np.concatenate([tail[row], x[row, :count]])
        want = [(seen[t : t + width] * weight).sum(0) + bias for t in range(count)]
        np.testing.assert_allclose(y[row, :count], np.array(want).reshape(count, channels), atol=1e-5)
        np.testing.assert_allclose(new[row], seen[count:], atol=1e-6)
    assert np.isfinite(y).all()
    plain, _ = causal_conv(*args[:3], None, ragged_of(counts))
    np.testing.assert_allclose(plain, y - args[3], atol=1e-5)


def test_states_start_from_zero_at_position_0_and_are_held_elsewhere():
    spec = CacheSpec(kind="state", streams=(Stream(name="s", shape=(2,)), Stream(name="t", shape=(), dtype="int32")))
    pool = {"s": jnp.arange(10.0).reshape(5, 2), "t": jnp.arange(5)}
    ragged = ragged_of([2, 3, 0], firsts=[4, 0, 0])
    old = held_states(spec, ragged, View(pool=pool, slots=jnp.array([3, 1, 4])))
    np.testing.assert_array_equal(
        old["s"], [[6, 7], [0, 0], [8, 9]]
    )  # the row without tokens keeps what is in the spare row
    np.testing.assert_array_equal(old["t"], [3, 0, 4])
    assert not any(np.asarray(x).any() for x in held_states(spec, ragged, None).values())


@pytest.mark.parametrize("groups, gate_first", [(1, True), (4, True), (2, False)])
def test_gated_norm_equals_its_equation(groups, gate_first, rng):
    y, z, weight = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), rng.normal(size=8)
    norm = ir.init_weights(GatedRMSNorm(8, groups=groups, gate_first=gate_first))
    norm.weight.set_value(jnp.asarray(weight, jnp.float32))
    gate = z / (1 + np.exp(-z))
    want = (y * gate if gate_first else y).reshape(5, groups, -1)
    want = (want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)).reshape(5, 8) * weight
    np.testing.assert_allclose(norm(jnp.asarray(y), jnp.asarray(z)), want if gate_first else want * gate, atol=1e-5)


OPTIONS = {
    "no bias of the convolution": {"conv_bias": False},
    "no biases": {"bias": False},
    "dt limits": {"dt_limit": (0.3, 0.9)},
    "norm of groups": {"norm_groups": 2},
    "norm before the gate": {"gate_first": False},
    "no norm": {"norm": False},
}
TOGETHER = {
    "limits, groups": {"conv_bias": False, "bias": False, "dt_limit": (0.3, 0.9), "norm_groups": 2},
    "norm first, chunks of 3": {"gate_first": False, "chunk": 3},
    "no norm, padding": {"norm": False},
}


def mamba(**options) -> Mamba2:
    return ir.init_weights(Mamba2(D, heads=4, head_dim=4, state_dim=8, groups=2, **({"bias": True} | options)))


@functools.partial(jax.jit, static_argnums=0)
def run(graph, leaves, x, ragged, pool=None, slots=None):
    view = None if pool is None else View(pool=pool, slots=slots)
    return nnx.merge(graph, leaves)(x, ragged, view)


@pytest.mark.parametrize("options", TOGETHER.values(), ids=TOGETHER)
def test_rows_in_chunks_equal_each_row_alone(options, rng):
    """Three rows of 9, 4 and 6 tokens in steps of other lengths, in slots that hold NaN of whoever was there before."""
    graph, leaves = nnx.split(layer := mamba(**options))
    lengths, total, longest = (9, 4, 6), 8, 4
    x = rng.normal(size=(3, 9, D)).astype(np.float32)
    alone = [run(graph, leaves, jnp.asarray(x[i]), Ragged.dense(1, 9))[0][:n] for i, n in enumerate(lengths)]
    pool = {k: jnp.full_like(v, jnp.nan) for k, v in layer.cache.init(Layout(pages=1, page_size=1, slots=3)).items()}
    done, got = [0, 0, 0], [[], [], []]
    for counts in ([4, 1, 0], [1, 1, 2], [3, 0, 3], [0, 2, 1], [1, 0, 0]):
        ragged = ragged_of(counts, done, total, longest)
        flat = np.full((total, D), np.nan, np.float32)
        flat[: sum(counts)] = np.concatenate([x[i, done[i] : done[i] + n] for i, n in enumerate(counts)])
        slots = jnp.array([slot if n else 3 for slot, n in zip((2, 0, 1), counts, strict=True)])
        y, pool = run(graph, leaves, jnp.asarray(flat), ragged, pool, slots)
        for row, part in enumerate(np.split(np.asarray(y)[: sum(counts)], np.cumsum(counts)[:-1])):
            got[row].append(part)
        done = [a + b for a, b in zip(done, counts, strict=True)]
    for row in range(3):
        np.testing.assert_allclose(np.concatenate(got[row]), alone[row], atol=2e-5, rtol=1e-5)


def test_every_option_changes_the_result(rng):
    """With the same weights where both have them."""
    plain = mamba()
    weights = {path: v.get_value() + (0.5 if path.endswith("bias") else 0) for path, v in ir.params(plain).items()}
    x = jnp.asarray(rng.normal(size=(6, D)), jnp.float32)

    layers = [plain, *(mamba(**options) for options in OPTIONS.values())]
    for layer in layers:
        for path, variable in ir.params(layer).items():
            variable.set_value(weights[path])
    parts = [nnx.split(layer) for layer in layers]
    graphs = [graph for graph, _ in parts]

    @jax.jit
    def results(leaves):
        made = [nnx.merge(graph, own) for graph, own in zip(graphs, leaves, strict=True)]
        return [layer(x, Ragged.dense(1, 6), None)[0] for layer in made]

    want, *others = results([leaves for _, leaves in parts])
    for name, other in zip(OPTIONS, others, strict=True):
        assert np.abs(want - other).max() > 1e-2, name


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_scan_does_not_depend_on_the_chunk(chunk, rng):
    shape = (2, 7, 4)
    args = [rng.normal(size=(*shape, 3)), rng.uniform(0, 1, size=shape), -rng.uniform(0.1, 2, size=4)]
    args += [*rng.normal(size=(2, 2, 7, 2, 5)), rng.normal(size=(2, 4, 3, 5))]
    args = [jnp.asarray(a, jnp.float32) for a in args]
    scan = jax.jit(ssm_scan, static_argnames="chunk")
    for got, want in zip(scan(*args, chunk=chunk), scan(*args), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_stream_may_be_float32_between_bfloat16_parts():
    residual = Residual(dtype="float32", added=0.5)
    norm, mlp = RMSNorm(D, out="bfloat16", dtype="bfloat16"), MLP(D, 8, activation="relu2", dtype="bfloat16")
    block = ir.init_weights(Block(mlp_norm=norm, mlp=mlp, mlp_residual=residual))
    x = jnp.full((2, D), 1 + 2**-7, jnp.bfloat16)
    y, _ = block(x, Ragged.dense(1, 2), None)
    part = block.mlp(block.mlp_norm(x))
    assert y.dtype == jnp.float32 and part.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x.astype(jnp.float32) + part.astype(jnp.float32) * 0.5)
    assert str(residual) == "x + 0.5 y in float32"


def test_latent_experts_run_in_part_and_their_projections_in_full(rng):
    experts = Experts(4, 6, 5, glu=Glu(activation="relu2"), gated=False)
    moe = ir.init_weights(MoE(Router(D, 4, top_k=1), LatentExperts(D, 6, experts)))
    assert ir.active_count(moe) == D * 4 + 2 * D * 6 + 2 * 6 * 5
    x = rng.normal(size=(7, D)).astype(np.float32)
    w = {path: np.asarray(v.get_value(), np.float64) for path, v in ir.params(moe).items()}
    best = (x @ w["router/weight"]).argmax(-1)
    hidden = np.einsum("tr,trf->tf", x @ w["experts/enter/weight"], w["experts/inner/up/weight"][best])
    inner = np.einsum("tf,tfr->tr", np.maximum(hidden, 0) ** 2, w["experts/inner/down/weight"][best])
    np.testing.assert_allclose(
        jax.jit(lambda moe, x: moe(x))(moe, jnp.asarray(x)), inner @ w["experts/leave/weight"], atol=1e-5
    )


def test_a_recurrent_layer_decodes_at_the_same_cost_at_any_context():
    """FLOPs and bytes of the compiled step; attention's grow with what it reads."""
    recurrent, attention = mamba(), ir.init_weights(Attention(D, heads=4, kv_heads=2, head_dim=8, rope=None))
    short, long = (layer_cost(recurrent, D, context) for context in (64, 4096))
    assert short == long and min(short) > 0
    short, long = (layer_cost(attention, D, context) for context in (64, 4096))
    assert long[0] > 10 * short[0] and long[1] > 10 * short[1]
