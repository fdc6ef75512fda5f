"""`add_norm` and `gated_act`: the Hopper kernels run thread by thread, lowered for CUDA, what they refuse; a model that calls
them computes what it computed without."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lanes import Lanes

from optx import lower
from optx.bench.cases import registry
from optx.bench.timing import relative_error
from optx.cache import Ragged
from optx.errors import LoweringError
from optx.nn import Attention, Block, CausalLM, Embed, FusedGatedMLP, GatedMLP, JoinedGatedMLP, Residual, RMSNorm, Rope
from optx.nn.core import ACTIVATIONS
from optx.pallas import dispatch, late
from optx.pallas.add_norm import mosaic_gpu_sm90 as add_norm
from optx.pallas.dispatch import OpChoice
from optx.pallas.gated_act import mosaic_gpu_sm90 as gated_act
from optx.passes.fuse_projections import join
from optx.target import TARGETS

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
OPS = ("add_norm", "gated_act")
CASES = registry.cases(OPS)
SMALL = [case for case in CASES if case.small]
KERNELS = {"add_norm": add_norm, "gated_act": gated_act}
name = lambda case: f"{case.op}-{case.name}"  # noqa: E731


def norms_on_threads(x, y, weight, *, eps, offset):
    """The kernel's program on numpy arrays: what its launch would do."""
    plan = add_norm.Plan(
        tokens=x.shape[0],
        width=x.shape[1],
        dtype=str(x.dtype),
        weight=str(weight.dtype),
        eps=eps,
        offset=offset,
        added=y is not None,
    )
    parts = [np.array(part) for part in (x, y) if part is not None]
    outs = [np.full(x.shape, np.nan, x.dtype) for _ in parts]
    sums = np.full((plan.tokens, plan.sums), np.nan, np.float32)
    machine = Lanes(plan.tokens, outs, plan.threads)
    add_norm.program(machine, plan, parts, np.array(weight), outs, sums)
    return (outs[0] if plan.added else x), outs[-1]


def acts_on_threads(gate, up, *, activation):
    f = gate.shape[1] // (2 if up is None else 1)
    plan = gated_act.Plan(
        tokens=gate.shape[0], width=f, joined=up is None, dtype=str(gate.dtype), activation=activation
    )
    out = np.full((plan.tokens, f), np.nan, gate.dtype)
    blocks = -(-plan.chunks // gated_act.THREADS)
    parts = [np.array(part) for part in (gate, up) if part is not None]
    with np.errstate(over="ignore"):
        gated_act.program(Lanes(blocks, [out]), plan, parts, out)
    return out


ON_THREADS = {"add_norm": norms_on_threads, "gated_act": acts_on_threads}


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_against_the_reference_in_float32(case):
    args, kwargs = case.make(np.random.default_rng(0))
    found, wanted = ON_THREADS[case.op](*args, **kwargs), registry.reference(case.op, args, kwargs)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative_error(jnp.asarray(x), y) < case.tolerance


@pytest.mark.parametrize("case", [c for c in SMALL if c.make.keywords.get("activation") != "gelu_tanh"], ids=name)
def test_rounds_where_the_reference_does(case):
    """Run step by step in 16 bits the reference gives the same bits, but where the order of a sum or the last bit of a
    sigmoid tips one."""
    args, kwargs = case.make(np.random.default_rng(0))
    with jax.disable_jit():
        wanted = STEPWISE[case.op](*args, **kwargs)
    found = ON_THREADS[case.op](*args, **kwargs)
    if case.op == "add_norm":
        np.testing.assert_array_equal(found[0], wanted[0])
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.mean(np.asarray(x) != np.asarray(y)) <= 0.002


def acts_stepwise(gate, up, *, activation):
    """silu by its equation: of a sigmoid in 16 bits XLA on a CPU rounds every part."""
    gate, up = jnp.split(gate, 2, axis=-1) if up is None else (gate, up)
    return gate * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(gate.dtype) * up


STEPWISE = {"add_norm": dispatch.rows("add_norm")[-1].run, "gated_act": acts_stepwise}


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_lowers_for_cuda(case):
    args, kwargs = case.make(np.random.default_rng(0))
    run = lambda args: KERNELS[case.op].__dict__[case.op](*args, **kwargs)  # noqa: E731
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=unchecked)(args)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == 1, "one launch"
    wanted = jax.eval_shape(lambda args: dispatch.rows(case.op)[-1].run(*args, **kwargs), args)
    found = [(x.shape, x.dtype) for x in exported.out_avals]
    assert found == [(x.shape, x.dtype) for x in jax.tree.leaves(wanted)]


def test_kernels_wait_for_those_before_where_they_overlap():
    """And say so in their launch; elsewhere nothing is added to them."""
    x, weight = jax.ShapeDtypeStruct((2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64,), jnp.bfloat16)

    def text(x, weight):
        jax.clear_caches()
        return str(jax.make_jaxpr(lambda *args: add_norm.add_norm(args[0], None, args[1], eps=1e-6))(x, weight))

    words = ("griddepcontrol_launch_dependents", "griddepcontrol_wait")
    assert [word in late.overlapped(text)(x, weight) for word in words] == [True, True]
    assert [word in text(x, weight) for word in words] == [False, False]


def test_one_token_that_is_not_finite_stays_alone():
    (x, y, weight), kwargs = registry.cases(["add_norm"])[3].make(np.random.default_rng(0))
    _, normed = norms_on_threads(x.at[1, 5].set(jnp.nan), y, weight, **kwargs)
    assert np.isnan(normed[1]).all() and np.isfinite(normed[[0, 2]].astype(np.float32)).all()


@pytest.mark.parametrize("item", [*CASES, *registry.shapes(OPS)], ids=name)
def test_supports_its_cases(item):
    assert KERNELS[item.op].supports(item.site, HOPPER) is None


NORM = {"d": 4096, "dtype": "bfloat16", "weights": ("float32", "bfloat16")}
ACT = {"f": 4096, "dtype": "bfloat16", "activation": "silu"}


@pytest.mark.parametrize(
    "kernel, site, reason",
    [
        (add_norm, NORM | {"dtype": "float32"}, "activations of float32"),
        (add_norm, NORM | {"d": 4100}, "4100 numbers a token; allowed: a multiple of 8, at most 16384"),
        (add_norm, NORM | {"d": 16392}, "16392 numbers"),
        (add_norm, NORM | {"weights": ("float32", "float8_e4m3fn")}, "a weight of float8_e4m3fn"),
        (gated_act, ACT | {"dtype": "float32"}, "activations of float32"),
        (gated_act, ACT | {"f": 12}, "12 numbers a token; allowed: a multiple of 8"),
        (gated_act, ACT | {"activation": "relu2"}, "activation relu2; allowed: silu, gelu_tanh"),
    ],
)
def test_declines(kernel, site, reason):
    assert reason in kernel.supports(site, HOPPER)
    assert "sm90" in kernel.supports(site, types.SimpleNamespace(platform="gpu", arch="sm100"))


HALF, WIDE = jnp.zeros((2, 64), jnp.bfloat16), jnp.zeros((2, 64))
KWARGS = {"add_norm": {"eps": 1e-6, "offset": 0.0}, "gated_act": {"activation": "silu"}}


@pytest.mark.parametrize(
    "op, args, said",
    [
        ("add_norm", (WIDE, None, WIDE[0]), "activations of float32; allowed: bfloat16, float16"),
        ("add_norm", (HALF, WIDE, HALF[0]), "y is float32; allowed: bfloat16, as x"),
        ("gated_act", (WIDE, WIDE), "activations of float32"),
        ("gated_act", (HALF, WIDE), "up is float32; allowed: bfloat16, as gate"),
    ],
)
def test_refuses(op, args, said):
    with pytest.raises(LoweringError, match=f"{op}: {said}"):
        KERNELS[op].__dict__[op](*args, **KWARGS[op])


@pytest.mark.parametrize(
    "op, args, said",
    [
        ("add_norm", (HALF.astype(jnp.int32), None, HALF[0]), "x is int32[2, 64]; allowed: floating [T, D]"),
        ("add_norm", (HALF, HALF[:1], HALF[0]), "y is bfloat16[1, 64]; allowed: [2, 64], as x, or None"),
        ("add_norm", (HALF, None, HALF[0, :8]), "weight is bfloat16[8]; allowed: [64]"),
        ("gated_act", (HALF, HALF[:, :8]), "up is bfloat16[2, 8]; allowed: [2, 64], as gate"),
        ("gated_act", (HALF[:, :3], None), "gate is bfloat16[2, 3]; allowed: [T, 2F]"),
    ],
)
def test_wrong_shapes_are_named(op, args, said):
    with pytest.raises(LoweringError, match=re.escape(f"{op}: {said}")):
        dispatch.call(op, (), *args, **KWARGS[op])


def test_a_required_backend_takes_rows_that_are_not_verified_yet():
    for op, site in (("add_norm", NORM), ("gated_act", ACT)):
        site = dispatch.OpSite(op=op, args=site)
        chosen = {require: dispatch.select(site, TARGETS["h100"], require) for require in (None, "mosaic_gpu")}
        row = dispatch.rows(op)[0]
        assert str(chosen["mosaic_gpu"]) == row.name
        assert str(chosen[None]) == (row.name if row.verified else "xla")
    odd = dispatch.OpSite(op="gated_act", args=ACT | {"activation": "relu"})
    assert str(dispatch.select(odd, TARGETS["h100"], "mosaic_gpu")) == "xla", "the reference is as good there"


# --- Models -----------------------------------------------------------------------------------------------------------


def block(rngs, *, post=False, residual=None, mlp=True, out=None):
    norm = lambda: RMSNorm(16, offset=1.0, out=out, rngs=rngs)  # noqa: E731
    rope = Rope(theta=1e4, dim=8)
    return Block(
        norm=norm(),
        mixer=Attention(16, heads=2, kv_heads=1, head_dim=8, rope=rope, rngs=rngs),
        mlp_norm=norm() if mlp else None,
        mlp=GatedMLP(16, 24, rngs=rngs) if mlp else None,
        post_norm=norm() if post else None,
        post_mlp_norm=norm() if post and mlp else None,
        residual=residual,
        mlp_residual=residual,
    )


def plainly(model, tokens, ragged):
    """The stack as its equations say, each sum where it is made -> (hidden, inputs of the layers)."""
    x, inputs = model.embed(tokens), []
    for layer in model.layers:
        inputs.append(x)
        parts = (
            (layer.norm, layer.mixer, layer.post_norm, layer.residual),
            (layer.mlp_norm, layer.mlp, layer.post_mlp_norm, layer.mlp_residual),
        )
        for norm, part, post, residual in parts:
            if part is not None:
                normed = norm(x)
                y = part(normed, ragged, None)[0] if part is layer.mixer else part(normed)
                x = (residual or Residual())(x, normed, y if post is None else post(y))
    return model.norm(x), inputs


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"post": True},
        {"mlp": False},
        {"residual": Residual(added=0.5)},
        {"residual": Residual(normed=True)},
        {"out": "bfloat16"},
    ],
    ids=str,
)
def test_a_stack_computes_what_its_equations_say(change):
    rngs = nnx.Rngs(0)
    blocks = [block(rngs, **change), block(rngs), block(rngs, **change)]
    model = CausalLM(embed=Embed(32, 16, rngs=rngs), layers=blocks, norm=RMSNorm(16, rngs=rngs), head=None, context=64)
    tokens, ragged = jnp.arange(6, dtype=jnp.int32), Ragged.dense(1, 6)
    hidden, _, tapped = model.backbone(tokens, ragged, taps=(0, 1, 2))
    untapped, _, _ = model.backbone(tokens, ragged)
    wanted, inputs = plainly(model, tokens, ragged)
    for x, y in zip((hidden, untapped, *tapped), (wanted, wanted, *inputs), strict=True):
        np.testing.assert_array_equal(x, y)
    alone, _ = blocks[0](inputs[0], ragged, None)
    np.testing.assert_array_equal(alone, inputs[1])


def test_a_block_of_bfloat16_calls_its_ops_where_lowering_chose_them(monkeypatch):
    """Twice around a layer, and the sum behind it is left to the next one."""
    rngs, calls = nnx.Rngs(0), []
    model = CausalLM(
        embed=Embed(32, 16, rngs=rngs), layers=[block(rngs), block(rngs)], norm=RMSNorm(16, rngs=rngs), head=None,
        context=64,
    )  # fmt: skip
    for layer in model.layers:
        layer.choices = (OpChoice(op="add_norm", backend="mosaic_gpu", arch="sm90"),)
        layer.mlp.choices = (OpChoice(op="gated_act", backend="mosaic_gpu", arch="sm90"),)
    reference = {op: dispatch.rows(op)[-1].run for op in OPS}

    def counted(op):
        return lambda *args, **kwargs: calls.append((op, args[1] is not None)) or reference[op](*args, **kwargs)

    for op, kernel in KERNELS.items():
        monkeypatch.setattr(kernel, op, counted(op))
    model.backbone(jnp.arange(6, dtype=jnp.int32), Ragged.dense(1, 6))
    one = [("add_norm", True), ("gated_act", True)]
    assert calls == [("add_norm", False), *one, ("add_norm", True), *one]


def test_sites_of_a_lowered_block():
    blocks = {
        dtype: Block(
            norm=RMSNorm(64, dtype=dtype), mlp_norm=RMSNorm(64, dtype=dtype), mlp=GatedMLP(64, 96, dtype=dtype)
        )
        for dtype in ("bfloat16", "float32")
    }
    for require, dtype, chosen in (
        ("mosaic_gpu", "bfloat16", "mosaic_gpu/sm90"),
        ("mosaic_gpu", "float32", "xla"),
    ):
        found = lower.lower(nnx.List([blocks[dtype].mlp, blocks[dtype]])[1], TARGETS["h100"], require)
        assert [str(c) for c in found.choices] == [chosen]
        assert [str(c) for c in found.mlp.choices] == [chosen]
    assert Block(norm=RMSNorm(64, out="float32")).op_sites() == ()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlps_compute_the_same_in_one_weight_or_two(activation):
    rngs = nnx.Rngs(0)
    plain, joined = (kind(16, 24, activation=activation, rngs=rngs) for kind in (GatedMLP, JoinedGatedMLP))
    fused = FusedGatedMLP(join(plain.gate, plain.up), plain.down, activation=activation)
    joined.gate_up, joined.down = fused.gate_up, fused.down
    x = jax.random.normal(jax.random.key(0), (3, 16))
    wanted = plain.down(ACTIVATIONS[activation](plain.gate(x)) * plain.up(x))
    np.testing.assert_array_equal(plain(x), wanted)
    for part in (fused, joined):
        assert relative_error(part(x), wanted) < 1e-6
    assert list(plain.op_sites()) == [fused.op_sites()[0]] == [joined.op_sites()[0]]
