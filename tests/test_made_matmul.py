"""`norm_matmul` and `gated_matmul`: the Hopper kernel that makes its row of x, thread by thread, interpreted and lowered; parts
of a model whose products make their inputs compute what they computed without."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lanes import Lanes

from optx import formats, lower, tensor
from optx.bench.cases import registry
from optx.bench.cases.add_norm import call as norm_call
from optx.bench.timing import relative_error
from optx.cache import Ragged
from optx.nn import Attention, Block, CausalLM, Embed, FusedAttention, FusedGatedMLP, GatedMLP, Linear, RMSNorm, Rope
from optx.nn.core import Adapter
from optx.pallas import dispatch
from optx.pallas.add_norm import mosaic_gpu_sm90 as add_norm
from optx.pallas.dispatch import OpChoice
from optx.pallas.gated_matmul import mosaic_gpu_sm90 as gated_matmul
from optx.pallas.norm_matmul import mosaic_gpu_sm90 as norm_matmul
from optx.pallas.quant_matmul import mosaic_gpu_sm90 as kernel
from optx.pallas.quant_matmul import mosaic_gpu_sm90_made as makers
from optx.passes.fuse_projections import join
from optx.target import TARGETS

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
OPS = ("norm_matmul", "gated_matmul")
KERNELS = {"norm_matmul": norm_matmul, "gated_matmul": gated_matmul}
CASES = registry.cases(OPS)
SMALL = [case for case in CASES if case.small]
name = lambda case: f"{case.op}-{case.name}"  # noqa: E731


# --- The row, on threads ----------------------------------------------------------------------------------------------


def norm_on_threads(x, y, weight, most, **kwargs):
    """-> [sum,] norm by a block of at most so many threads."""
    plan = dataclasses.replace(makers.normed(x, y, weight, **kwargs).plan, most=most)
    parts = [np.array(part) for part in (x, y) if part is not None]
    outs = [np.full(x.shape, np.nan, x.dtype) for _ in parts]
    sums = np.full((1, plan.sums), np.nan, np.float32)
    add_norm.program(Lanes(1, outs, plan.threads), plan, parts, np.array(weight), outs, sums)
    return outs


@pytest.mark.parametrize("d", [64, 1152, 4096, 8200, 16384])
@pytest.mark.parametrize("added", [True, False])
def test_a_norm_has_the_same_bits_by_a_warpgroup_and_by_a_large_block(d, added):
    (x, y, weight), kwargs = norm_call(np.random.default_rng(0), 1, d, added=added)
    few, many = (norm_on_threads(x, y, weight, most, **kwargs) for most in (makers.GROUP, add_norm.LARGEST))
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("d", "split"), [(12288, 2), (12288, 1), (1088, 1), (192, 1)])
def test_shares_of_a_gated_row(d, split):
    both = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2 * d)), jnp.bfloat16)
    made, found = makers.gated(both, "silu"), []
    for rank in range(split):
        row = np.full(made.room(split), np.nan, both.dtype)
        machine = Lanes(1, [row])
        made.program(machine, [np.array(both)], [], row, None, np.full(128, rank, np.int32), d // split)
        found.append(row[: d // split])
    wanted = dispatch.rows("gated_act")[-1].run(both.astype(jnp.float32), None, activation="silu")[0]
    assert relative_error(jnp.asarray(np.concatenate(found)), wanted) < 1e-2


@pytest.mark.parametrize("count", [64, 128, 256])
def test_a_step_lies_in_the_first_row_of_its_tiles(count):
    row, slot = np.arange(1024).astype(np.int16), np.full((count // 64, 8, 64), -1, np.int16)
    makers.hand_program(Lanes(1, [slot]), row, slot, np.full(128, 512, np.int32), count)
    np.testing.assert_array_equal(slot[:, 0].ravel(), row[512 : 512 + count])
    assert (slot[:, 1:] == -1).all()


# --- The kernel -------------------------------------------------------------------------------------------------------


def interpret(case, args, kwargs, **tiles):
    *_, w = args
    w = kernel.relayout(w) if tensor.is_packed(w) else w
    found = kernel.tiles_for(1, w) if tensor.is_packed(w) else kernel._dense(1, w.shape[0] // 64, w.shape[1] // 64)
    tiles = dataclasses.replace(found, **{"grid": 2, "stages": 3, "share": 1, "split": 1, "registers": False} | tiles)
    if case.op == "norm_matmul":
        given = [part for part in args[:3] if part is not None]
        made = makers.normed(*args[:3], **kwargs)
    else:
        given, made = args[:1], makers.gated(args[0], **kwargs)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return kernel.made_matmul(made, given, w, tiles=tiles)


@pytest.mark.parametrize("case", SMALL, ids=name)
@pytest.mark.parametrize("tiles", [{}, {"strips": 1, "grid": 1, "stages": 2}], ids=["", "several items a block"])
def test_interpreted(case, tiles):
    args, kwargs = case.make(np.random.default_rng(0))
    wanted = jax.tree.leaves(registry.reference(case.op, args, kwargs))
    found = interpret(case, args, kwargs, **tiles)
    for x, y in zip(found, wanted[-len(found) :], strict=True):
        assert relative_error(x.astype(jnp.float32), y) < case.tolerance


@pytest.mark.parametrize("case", CASES, ids=name)
def test_tiles_fit_an_sm(case):
    plans = []
    run = lambda *args: KERNELS[case.op].__dict__[case.op](*args, **kwargs)  # noqa: E731

    def call(*given, rows, plan):
        plans.append(plan)
        return [jnp.zeros((rows, plan.depth)) for _ in range(plan.streams)] + [jnp.zeros((rows, 64 * plan.strips))]

    args, kwargs = _abstract(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_call", call)
        jax.eval_shape(run, *args)
    (plan,) = plans
    w = args[-1]
    w = jax.eval_shape(kernel.relayout, w) if tensor.is_packed(w) else w
    assert kernel.shared(plan, w, plan.tiles.stages) <= kernel.SHARED
    assert plan.tiles.stages >= 3 * plan.tiles.share and plan.tiles.rows in (8, 16)


def _abstract(case):
    """(args, kwargs) of a case as shapes."""
    keywords = case.make.keywords
    d, f, tokens = keywords["d"], keywords["f"], keywords.get("tokens", 1)
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    w = half(d, f) if keywords["stored"] is None else tensor.quantize(half(d, f), formats.parse(keywords["stored"]))
    if case.op == "gated_matmul":
        return (half(tokens, 2 * d), w), {"activation": keywords.get("activation", "silu")}
    y = half(tokens, d) if keywords.get("added", True) else None
    weight = jax.ShapeDtypeStruct((d,), keywords.get("weight", "bfloat16"))
    return (half(tokens, d), y, weight, w), {"eps": 1e-6, "offset": keywords.get("offset", 0.0)}


@pytest.mark.parametrize("case", [case for case in CASES if "4096" in case.name][::5], ids=name)
def test_one_launch_of_one_token(case):
    args, kwargs = _abstract(case)
    run = lambda *args: KERNELS[case.op].__dict__[case.op](*args, **kwargs)  # noqa: E731
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=unchecked)(*args)
    assert exported.mlir_module().count("@mosaic_gpu_v2") == (1 if case.make.keywords.get("tokens", 1) == 1 else 2)
    wanted = jax.eval_shape(lambda *args: dispatch.rows(case.op)[-1].run(*args, **kwargs), *args)
    assert [x.shape for x in exported.out_avals] == [x.shape for x in jax.tree.leaves(wanted)]


@pytest.mark.parametrize("item", [*CASES, *registry.shapes(OPS)], ids=name)
def test_supports_its_cases(item):
    assert KERNELS[item.op].supports(item.site, HOPPER) is None


def test_declines():
    def dense(d, f):
        return {"weight": jax.ShapeDtypeStruct((d, f), jnp.bfloat16), "dtype": "bfloat16"}

    assert "16448 numbers a token; allowed: 16384" in norm_matmul.supports(dense(16448, 4096), HOPPER)
    assert "XLA is as fast below" in norm_matmul.supports(dense(1024, 1024), HOPPER)
    packed = SMALL[0].site
    assert "activations in int8" in norm_matmul.supports(packed | {"activations": formats.parse("int8")}, HOPPER)
    gated = next(case for case in SMALL if case.op == "gated_matmul").site
    assert "activation relu" in gated_matmul.supports(gated | {"activation": "relu"}, HOPPER)
    for op, site in (("norm_matmul", packed), ("gated_matmul", gated)):
        assert "sm90" in KERNELS[op].supports(site, types.SimpleNamespace(platform="gpu", arch="sm100"))


# --- Models -----------------------------------------------------------------------------------------------------------

CHOICES = tuple(OpChoice(op=op, backend="mosaic_gpu", arch="sm90") for op in OPS)


def layer(rngs):
    attn = Attention(16, heads=2, kv_heads=1, head_dim=8, rope=Rope(theta=1e4, dim=8), bias=True, rngs=rngs)
    mlp = GatedMLP(16, 24, bias=True, rngs=rngs)
    return Block(
        norm=RMSNorm(16, offset=1.0, rngs=rngs),
        mixer=FusedAttention(attn, join(attn.q, attn.k, attn.v)),
        mlp_norm=RMSNorm(16, rngs=rngs),
        mlp=FusedGatedMLP(join(mlp.gate, mlp.up), mlp.down, activation="silu"),
    )


@pytest.mark.parametrize("change", ["", "adapter", "post_norm"])
def test_parts_whose_products_make_their_inputs(monkeypatch, change):
    """An adapter reads the input as well: the op before it stays."""
    rngs, calls = nnx.Rngs(0), []
    model = CausalLM(
        embed=Embed(32, 16, rngs=rngs),
        layers=[layer(rngs), layer(rngs)],
        norm=RMSNorm(16, rngs=rngs),
        head=None,
        context=64,
    )
    for block in model.layers:
        if change == "adapter":
            block.mixer.qkv.adapter = nnx.data(Adapter(16, 32, 4, rngs=rngs))
        if change == "post_norm":
            block.post_norm = nnx.data(RMSNorm(16, rngs=rngs))
    run = lambda: model.backbone(jnp.arange(6, dtype=jnp.int32), Ragged.dense(1, 6))[0]  # noqa: E731
    wanted = run()
    for block in model.layers:
        block.mixer.choices = block.mlp.choices = CHOICES

    def counted(op, reference):
        return lambda *args, **kwargs: calls.append((op, args[1] is not None)) or reference(*args, **kwargs)

    for op in OPS:
        monkeypatch.setattr(KERNELS[op], op, counted(op, dispatch.rows(op)[-1].run))
    np.testing.assert_allclose(run(), wanted, rtol=1e-5, atol=1e-5)
    qkv = [] if change == "adapter" else [("norm_matmul", True)]
    mlp = [("norm_matmul", True), ("gated_matmul", True)]
    first = [("norm_matmul", False)] if qkv else []
    assert calls == [*first, *mlp, *qkv, *mlp]


def test_sites():
    mlp = FusedGatedMLP(Linear(4096, 24576, dtype="bfloat16"), Linear(12288, 4096, dtype="bfloat16"), activation="silu")
    chosen = {require: lower.choose(mlp, TARGETS["h100"], require) for require in ("mosaic_gpu", "xla")}
    assert {choice.op for choice in chosen["xla"].choices} == {"gated_act", "norm_matmul", "gated_matmul"}
    assert (
        chosen["mosaic_gpu"].first is chosen["mosaic_gpu"].gate_up and chosen["xla"].first is None and mlp.first is None
    )

    class Turned(Linear):
        """Its weight does not read x as it is."""

    turned = FusedGatedMLP(Turned(64, 128), Turned(64, 64), activation="silu")
    assert [site.op for site in turned.op_sites()] == ["gated_act"]
