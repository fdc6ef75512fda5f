"""`chained_matmul`: the Hopper kernel's threads on arrays, its plans, and its rows."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lanes import Lanes

from optx import formats, lower
from optx.bench.cases import registry
from optx.bench.cases.norm_matmul import site as product_site
from optx.bench.timing import relative_error
from optx.cache import Ragged
from optx.nn import Attention, Block, CausalLM, Embed, FusedAttention, FusedGatedMLP, GatedMLP, Linear, RMSNorm, Rope
from optx.nn.core import Adapter
from optx.pallas import dispatch
from optx.pallas.chained_matmul import mosaic_gpu_sm90 as kernel
from optx.pallas.chained_matmul import threads
from optx.pallas.chained_matmul.threads import BLOCK, GATED, GIVEN
from optx.pallas.dispatch import OpChoice
from optx.pallas.quant_matmul.mosaic_gpu_sm90_fragments import relayout
from optx.passes.fuse_projections import join
from optx.target import TARGETS

HOPPER = types.SimpleNamespace(platform="gpu", arch="sm90")
CASES = registry.cases(("chained_matmul",))
SMALL = [case for case in CASES if case.small]
name = lambda case: case.name  # noqa: E731


class Place(Lanes):
    """One thread block of several, between two meetings of all."""

    def __init__(self, place: int, refs, size: int):
        super().__init__(1, refs, size)
        self._place = place

    def block(self):
        return np.full(len(self._threads), self._place, np.int32)

    def share(self, ref, index, x, when):
        active = self._active & when
        self._pending.append((ref, (np.zeros(active.sum(), int), index[active]), x[active]))

    def shared(self, ref, start: int):
        return [np.broadcast_to(x, self._threads.shape) for x in ref[0, start : start + 4]]


def plan_of(args, kwargs) -> kernel.Plan:
    ws = weights_of(args)
    return kernel._plan(ws, kwargs["activation"], kwargs["eps"], kwargs["offset"], str(args[2].dtype))


def weights_of(args):
    *_, o, gate_up, down, following = args if isinstance(args[-1], tuple) else (*args, None)
    return [o, gate_up, down, *([] if following is None else [following[1]])]


def swizzled(w):
    """[step, 64] bfloat16 as the copy engine lays it down."""
    parts = np.array(w).view(np.uint16).reshape(-1, 8, 8)
    row = np.arange(len(parts))[:, None]
    return np.ascontiguousarray(parts[row, np.arange(8)[None] ^ (row & 7)])


def chained(plan: kernel.Plan, args):
    """The kernel's work in its order, thread blocks one after the other -> (stream, product)."""
    bf16, step = jnp.dtype("bfloat16"), plan.blocks * BLOCK
    row, x, weight, *_ = [np.array(arg) for arg in args[:3]]
    norms = [weight, *([np.array(args[-1][0])] if isinstance(args[-1], tuple) else [])]
    ws = [relayout(w) if plan.products[0].kind != "bf16" else w for w in weights_of(args)]
    stream, out = np.full(x.shape, np.nan, x.dtype), None
    state = [types.SimpleNamespace(kept=np.full(plan.norm.width, np.nan, bf16)) for _ in range(plan.grid)]
    norm, found = 0, []
    for i, product in enumerate(plan.products):
        out = np.full((product.parts, product.width), np.nan, jnp.dtype(product.stored))
        for place, own in enumerate(state):
            part = np.full(plan.threads, place % product.parts, np.int32)
            own.row = np.full(product.share, np.nan, bf16)
            before, y = (plan.products[i - 1], found[-1]) if i else (None, None)
            sums = np.full((1, plan.norm.sums), np.nan, np.float32)
            kept = own.kept.copy()
            m = Place(place, [own.row, kept, stream], plan.threads)
            if product.made == GIVEN:
                threads.give(m, product, plan.threads, row, own.row, part)
            elif product.made == GATED:
                threads.gate(m, product, plan.threads, before, plan.activation, y, own.row, part)
            else:
                source = own.kept if norm else x
                last = stream if norm == len(norms) - 1 else None
                m.load_early = m.load
                weight, wait = norms[norm], lambda: None
                threads.norm(m, plan.norm, product, before, source, kept, y, weight, last, own.row, sums, part, wait)
            own.kept = kept
        norm += product.made not in (GIVEN, GATED)
        packed = product.kind != "bf16"
        data, scale = (np.array(part) for part in (ws[i].parts if packed else (ws[i], ws[i])))
        for place, own in enumerate(state):
            for turn, item in enumerate(range(place, product.strips * product.parts, plan.grid)):
                strip, part = divmod(item, product.parts)
                totals = [np.zeros(plan.threads, np.float32)] * 2
                for k in range(product.share // step):
                    at = part * (product.share // step) + k
                    if packed:
                        words = plan.blocks * product.bits // 2
                        weights = np.ascontiguousarray(data[strip, at * words : (at + 1) * words])
                    else:
                        weights = swizzled(data[at * step : (at + 1) * step, strip * BLOCK : (strip + 1) * BLOCK])
                    first = at * step // product.group
                    scales = (
                        np.ascontiguousarray(scale[strip, first : first + kernel._scales(plan, product)])
                        if packed
                        else None
                    )
                    start = np.full(plan.threads, k * step, np.int32)
                    m = Place(place, [], plan.threads)
                    totals = threads.multiply(
                        m, product, plan.groups, plan.blocks, weights, scales, own.row, start, totals
                    )
                shared = np.full(2 * plan.groups * BLOCK, np.nan, np.float32)
                m = Place(place, [shared, out], plan.threads)
                threads.share(m, totals, shared, np.full(plan.threads, turn % 2, np.int32), plan.groups)
                numbers = [np.full(32, n, np.int32) for n in (turn % 2, strip, part)]
                m = Place(place, [shared, out], 32)
                threads.collect(m, product, plan.groups, shared, numbers[0], scale, out, *numbers[1:])
        found.append(out)
    if plan.products[-1].parts > 1:
        total = np.full((1, plan.products[-1].width), np.nan, bf16)
        for place in range(plan.grid):
            threads.total(Place(place, [total], plan.threads), plan.products[-1], plan.grid, out, total)
        out = total
    return stream, out


def parted(plan):
    """The contracted axis of every product in two where it divides."""
    halves = [1 + (p.depth % (2 * plan.blocks * BLOCK) == 0) for p in plan.products]
    products = [dataclasses.replace(p, parts=n) for p, n in zip(plan.products, halves, strict=True)]
    return dataclasses.replace(plan, products=tuple(products))


@pytest.mark.parametrize("case", SMALL, ids=name)
@pytest.mark.parametrize("change", [lambda plan: plan, parted], ids=["as planned", "in parts"])
def test_threads(case, change):
    args, kwargs = case.make(np.random.default_rng(0))
    plan = dataclasses.replace(change(plan_of(args, kwargs)), grid=6)
    wanted = case.pick(registry.reference(case.op, args, kwargs), kwargs)
    for found, want in zip(chained(plan, args), wanted, strict=True):
        assert relative_error(jnp.asarray(found, jnp.float32), want) < case.tolerance


# --- Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [*CASES, *registry.shapes(("chained_matmul",))], ids=name)
def test_plans_fit_an_sm(item):
    """Every step lies in its product, every thread's share of it in one scale or in whole ones."""
    assert kernel.supports(item.site, HOPPER) is None
    facts = item.site
    plan = kernel._plan(facts["weights"], facts["activation"], facts["eps"], facts["offset"], facts["norm"])
    assert plan.stages > plan.flying and plan.shared(plan.stages) <= kernel.SHARED
    for product in plan.products:
        assert product.share % (plan.blocks * BLOCK) == 0 and kernel.SMS % product.parts == 0
        units = 4 * plan.blocks // plan.groups
        assert units % threads.ATOM[product.bits] == 0
        assert not product.grouped or product.group % (16 * units) == 0 or 16 * units % product.group == 0


def test_declines():
    def asked(**change):
        return kernel.supports(SMALL[0].site | change, HOPPER)

    of = lambda stored, *sizes: tuple(product_site(*size, stored)["weight"] for size in sizes)  # noqa: E731
    sizes = ((512, 256), (256, 1024), (512, 256))
    assert "weights of several formats" in asked(weights=(*of("int4_g128", *sizes[:2]), *of("int4", sizes[2])))
    assert "zero points; allowed: symmetric" in asked(weights=of("int4_g128_asym", *sizes))
    assert "allowed: bf16, int4, int8, fp8_e4m3" in asked(weights=of("nvfp4", *sizes))
    assert "groups in multiples of 64" in asked(weights=of("int4_g32", *sizes))
    assert "multiples of 64" in asked(weights=of(None, (512, 256), (256, 1008), (504, 256)))
    assert "activation relu" in asked(activation="relu")
    assert "activations of float16; allowed: bfloat16" in asked(dtype="float16", weights=of(None, *sizes))
    assert "activations in int8" in asked(activations=formats.parse("int8"))
    assert "sm90" in kernel.supports(SMALL[0].site, types.SimpleNamespace(platform="gpu", arch="sm100"))


def test_declines_a_gpu_on_which_its_blocks_would_wait_forever(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", core_count=114)])
    assert "114 multiprocessors" in kernel.supports(SMALL[0].site, HOPPER)


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_lowers(case):
    args, kwargs = (
        jax.eval_shape(lambda: case.make(np.random.default_rng(0))[0]),
        case.make(np.random.default_rng(0))[1],
    )
    export = jax.export.export(jax.jit(lambda *args: kernel.chained_matmul(*args, **kwargs)[:2]), platforms=["cuda"])
    found = export(*args).out_avals
    wanted = jax.eval_shape(lambda *args: dispatch.rows("chained_matmul")[-1].run(*args, **kwargs)[:2], *args)
    assert [x.shape for x in found] == [x.shape for x in wanted]


# --- Models -----------------------------------------------------------------------------------------------------------


def layer(rngs, **norm):
    attn = Attention(16, heads=2, kv_heads=1, head_dim=8, rope=Rope(theta=1e4, dim=8), rngs=rngs)
    mlp = GatedMLP(16, 24, rngs=rngs)
    return Block(
        norm=RMSNorm(16, rngs=rngs, **norm),
        mixer=FusedAttention(attn, join(attn.q, attn.k, attn.v)),
        mlp_norm=RMSNorm(16, rngs=rngs),
        mlp=FusedGatedMLP(join(mlp.gate, mlp.up), mlp.down, activation="silu"),
    )


FOLLOWED = {
    "": [True, True, False],
    "norm": [False, True, False],  # what follows norms otherwise
    "adapter": [False, True, False],  # reads what follows as well
    "bias": [True, False],  # behind the attention of the last block, which is left out
    "qkv bias": [True, True, False],
    "post_norm": [False, False],  # the middle block is left out
}


@pytest.mark.parametrize("change", FOLLOWED)
@pytest.mark.parametrize("taps", [(), (0, 1, 2)])
def test_blocks_whose_products_are_chained(monkeypatch, change, taps):
    rngs, calls = nnx.Rngs(0), []
    layers = [layer(rngs), layer(rngs, **({"offset": 1.0} if change == "norm" else {})), layer(rngs)]
    parts = {"embed": Embed(32, 16, rngs=rngs), "norm": RMSNorm(16, rngs=rngs), "head": None, "context": 64}
    model = CausalLM(layers=layers, **parts)
    if change == "adapter":
        layers[1].mixer.qkv.adapter = nnx.data(Adapter(16, 32, 4, rngs=rngs))
    if change == "bias":
        layers[2].mixer.o.bias = nnx.data(nnx.Param(jnp.ones(16)))
    if change == "qkv bias":
        layers[1].mixer.qkv.bias = nnx.data(nnx.Param(jnp.arange(32.0)))
    if change == "post_norm":
        layers[1].post_norm = nnx.data(RMSNorm(16, rngs=rngs))
    run = lambda n: model.backbone(jnp.arange(n, dtype=jnp.int32), Ragged.dense(1, n), taps=taps)[::2]  # noqa: E731
    wanted, many = run(1), run(3)
    for block in layers:
        block.choices = (OpChoice(op="chained_matmul", backend="mosaic_gpu", arch="sm90"),)
    reference = dispatch.rows("chained_matmul")[-1].run

    def counted(*args, **kwargs):
        calls.append(args[6] is not None)
        assert (args[7] is None) == (len(calls) == 1), "what the last kernel left goes into the next"
        return *reference(*args, **kwargs)[:2], jnp.zeros(1, jnp.int32)

    monkeypatch.setattr(kernel, "chained_matmul", counted)
    monkeypatch.setattr(kernel, "takes", lambda weights, **kwargs: True)
    for found, want in zip(jax.tree.leaves(run(1)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    assert calls == FOLLOWED[change]
    for found, want in zip(jax.tree.leaves(run(3)), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(found, want)
    assert calls == FOLLOWED[change], "more tokens than one go by kernels of their own"


def test_sites():
    """A block is asked for with the weights of its three products, on one chip, and not where answers may not depend on
    others."""
    block = Block(
        norm=RMSNorm(512, dtype="bfloat16"),
        mixer=Attention(512, heads=8, kv_heads=4, head_dim=64, rope=Rope(theta=1e4, dim=64), dtype="bfloat16"),
        mlp_norm=RMSNorm(512, dtype="bfloat16"),
        mlp=FusedGatedMLP(Linear(512, 2048, dtype="bfloat16"), Linear(1024, 512, dtype="bfloat16"), activation="silu"),
    )
    block.mixer.cache = dataclasses.replace(block.mixer.cache, dtype="bfloat16")
    chosen = lower.choose(block, TARGETS["h100"])
    assert chosen.chains and not block.chains and not lower.choose(block, TARGETS["h100"], "xla").chains
    assert not lower.invariant(chosen, TARGETS["h100"]).chains
    block.mixer.o.bias = nnx.data(nnx.Param(jnp.zeros(512)))
    assert [site.op for site in block.op_sites()] == ["add_norm"]


@pytest.mark.parametrize(("behind", "entry"), [("int4_g128", None), (None, "int4_g128"), ("int4_g128", "int4_g128")])
def test_the_next_product_joins_where_its_weight_is_alike(behind, entry):
    """Weights of a recipe that packs some of them and not others."""

    def of(linear, stored):
        linear.weight = nnx.Param(product_site(*linear.weight.get_value().shape, stored)["weight"])
        return linear

    def block():
        sized = {"heads": 8, "kv_heads": 4, "head_dim": 64, "rope": Rope(theta=1e4, dim=64), "dtype": "bfloat16"}
        mixer = FusedAttention(Attention(512, **sized), of(Linear(512, 1024), entry))
        mixer.o = of(mixer.o, behind)
        mlp = FusedGatedMLP(of(Linear(512, 2048), behind), of(Linear(1024, 512), behind), activation="silu")
        norms = {name: RMSNorm(512, dtype="bfloat16") for name in ("norm", "mlp_norm")}
        return lower.choose(Block(mixer=mixer, mlp=mlp, **norms), TARGETS["h100"])

    first, second = block(), block()
    assert first.chains and second.chains
    assert first.leads_to(second) == (behind == entry)
