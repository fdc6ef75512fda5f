"""Products on Blackwell: kernels interpreted (tensor memory and barriers included, races looked for), block-scaled ones emulated
over the same tiles and index maps, weights re-laid and back, sizes, what rows decline."""

import dataclasses
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from optx import formats, tensor
from optx.bench.cases import registry
from optx.bench.cases.registry import in_float32
from optx.bench.timing import relative_error
from optx.errors import LoweringError
from optx.formats import fp4
from optx.pallas import dispatch
from optx.pallas.matmul import gemm_sm100 as gemm
from optx.pallas.matmul import mosaic_gpu_sm100 as dense
from optx.pallas.quant_matmul import mosaic_gpu_sm100 as wide
from optx.pallas.quant_matmul import mosaic_gpu_sm100_fp4 as blocks
from optx.pallas.quant_matmul import mosaic_gpu_sm100_w8a8 as eight
from optx.pallas.quant_matmul import reference
from optx.target import TARGETS

B200 = types.SimpleNamespace(platform="gpu", arch="sm100")
FORMATS = (
    "int4_g64",
    "int4_g32_asym",
    "int4",
    "int8",
    "int8_g128_asym",
    "int8_asym",
    "fp8_e4m3",
    "fp8_e4m3_g128",
    "mxfp4",
    "nvfp4",
)
TILES = gemm.Tiles(rows=32, depth=128, stages=2, grid=2, clip=False)


def inputs(stored, rows=20, d=256, f=256, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d)) * np.exp(rng.standard_normal((rows, 1)))
    w = rng.standard_normal((d, f)) * np.exp(rng.standard_normal(f))
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    return (x, tensor.quantize(w, formats.parse(stored))) if stored else (x, w)


def interpreted(run, *args, **kwargs):
    """float32 of run(*args), in which no race was found."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(run(*args, **kwargs))
    assert not gpu_callbacks.get_races().races_found
    return found.astype(jnp.float32)


@pytest.mark.parametrize(
    ("rows", "d", "f", "split"), [(20, 256, 384, 1), (40, 512, 128, 2)], ids=["three items", "two parts, two bands"]
)
def test_dense(rows, d, f, split):
    x, w = inputs(None, rows, d, f)
    found = interpreted(gemm.dense, x, w, tiles=dataclasses.replace(TILES, depth=64, split=split))
    assert relative_error(found, x.astype(jnp.float32) @ w.astype(jnp.float32)) < 5e-3


def test_tiles_that_leave_in_one_piece():
    """Several items a thread block, each of as many rows as leave at once: the place of one waits for the copy out of it."""
    x, w = inputs(None, 10, 128, 768)
    found = interpreted(gemm.dense, x, w, tiles=dataclasses.replace(TILES, rows=16, depth=64))
    assert relative_error(found, x.astype(jnp.float32) @ w.astype(jnp.float32)) < 5e-3


def paired(x, w, plan) -> jax.Array:
    """What `product` of pairs does, in plain JAX over the kernel's items and places, as the interpreter has no MMA of two blocks:
    w is [F, D], a block copies its half of both operands (`plgpu.CopyPartition`), one product makes half of the outputs in each.
    """
    tiles = plan.tiles
    out = np.full((tiles.split, plan.bands * tiles.rows, plan.outputs), np.nan, np.float32)
    x = np.pad(np.asarray(x, np.float32), ((0, plan.bands * tiles.rows - plan.rows), (0, 0)))

    def copied(a, first, size, numbers):
        """[block of the pair, size, numbers]"""
        return np.stack([a[first + rank * size : first + (rank + 1) * size, numbers] for rank in (0, 1)])

    for item in range(plan.items):
        column, band, part = (int(i) for i in gemm.place(item, plan))
        total = np.zeros((2, gemm.OUTPUTS, tiles.rows), np.float32)
        for k in range(plan.steps):
            numbers = slice(at := gemm.start(part, k, plan), at + tiles.depth)
            rows = np.concatenate(copied(x, band * tiles.rows, plan.held, numbers))
            total += copied(w, column * plan.span, gemm.OUTPUTS, numbers) @ rows.T
        for rank in (0, 1):
            outputs = column * plan.span + rank * gemm.OUTPUTS
            place = out[part, band * tiles.rows : (band + 1) * tiles.rows, outputs : outputs + gemm.OUTPUTS]
            assert np.isnan(place).all(), "an item is made once"
            place[...] = total[rank].T
    return jnp.asarray(out.sum(0)[: plan.rows])


@pytest.mark.parametrize(("rows", "split"), [(300, 1), (600, 2), (256 * 18 + 1, 1)], ids=["two", "parts", "many bands"])
def test_pairs_emulated(rows, split):
    x, w = inputs(None, rows, 128, 768)
    tiles = gemm.Tiles(rows=gemm.PAIRED, depth=64, stages=2, split=split, pair=True)
    plan = gemm.plan_dense(rows, w, tiles)
    found = paired(x, np.asarray(w, np.float32).T, plan)
    assert (plan.columns, plan.bands, plan.held) == (3, -(-rows // 256), 128)
    assert relative_error(found, x.astype(jnp.float32) @ w.astype(jnp.float32)) < 1e-5


@pytest.mark.parametrize("stored", [None, "fp8_e4m3", "int8"])
def test_pairs_lower(stored):
    """The whole call but for the assembler: which half of an operand a block copies, barriers of both, tensor memory."""
    x, w = inputs(stored, rows=1030, d=256, f=512)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(dense.matmul if stored is None else lambda x, w: eight.quant_matmul(x, w, formats.parse(stored)))
    lowered = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(x, w)
    assert lowered.out_avals[0].shape == (1030, 512) and "mosaic_gpu_v2" in lowered.mlir_module()


def test_who_works_in_pairs():
    """Many rows and outputs in whole pairs of tiles do; and there are no parts whose sum costs more than they save."""
    plan = lambda rows, f: gemm.plan_dense(rows, abstract(None, 4096, f)).tiles  # noqa: E731
    assert plan(4096, 8192).pair and plan(4096, 8192).grid == gemm.SMS // 2 and plan(5000, 4096).split == 1
    assert not plan(128, 8192).pair and not plan(4096, 8192 + 128).pair
    assert eight.plan_for(4096, abstract("fp8_e4m3")).tiles.pair
    assert not wide.plan_for(4096, jax.eval_shape(wide.relayout, abstract("int4_g128"))).tiles.pair


@pytest.mark.parametrize("rows", [16, 16 * 16, 16 * 17, 16 * 50])
@pytest.mark.parametrize("split", [1, 2])
def test_places_are_all_items(rows, split):
    """Each tile once; those of the same weights are neighbours, and what is met between two of them stays in the cache."""
    tiles = gemm.Tiles(rows=16, depth=64, stages=2, split=split)
    plan = gemm.Plan(tiles=tiles, depth=128, outputs=640, rows=rows, kind="dense")
    places = [tuple(int(i) for i in gemm.place(item, plan)) for item in range(plan.items)]
    assert sorted(places) == sorted(np.ndindex(5, plan.bands, split))
    assert all(len({band for _, band, _ in places[i : i + 40]}) <= 2 * gemm.BANDS for i in range(len(places)))


@pytest.mark.parametrize("stored", FORMATS)
def test_widened(stored):
    x, w = inputs(stored)
    found = interpreted(wide.quant_matmul, x, w, tiles=TILES)
    assert relative_error(found, reference.quant_matmul(*in_float32((x, w)))) < 5e-3


def test_widened_over_many_steps():
    """More steps than slots, parts that XLA adds, rows of two tiles."""
    x, w = inputs("int4_g128", rows=40, d=2048, f=128)
    found = interpreted(wide.quant_matmul, x, w, tiles=dataclasses.replace(TILES, stages=4, split=2))
    assert relative_error(found, reference.quant_matmul(*in_float32((x, w)))) < 5e-3


@pytest.mark.parametrize("stored", ["fp8_e4m3", "int8"])
def test_eight_bits_by_eight(stored):
    x, w = inputs(stored)
    activations = formats.parse(stored)
    found = interpreted(eight.quant_matmul, x, w, activations, tiles=TILES)
    assert relative_error(found, reference.quant_matmul(*in_float32((x, w)), activations)) < 5e-3


def emulated(x, w, activations, tiles):
    """What `product` of blocks does, item by item and step by step, in plain JAX: the kernel's items, places, scales and factors.

    The MMA reads the scale of output m and block 4 i + j at [m / 128, i, m % 32, 4 (m % 128 / 32) + j] (PTX ISA 9.1,
    figures of tcgen05-mma-scale-factor-a-layout).
    """
    w = blocks.relayout(w)
    plan = blocks.plan_for(len(x), w, tiles)
    codes, x_scale, x_outer = blocks._parts(tensor.quantize(x, activations, axis=-1))
    number = lambda s: s.astype(jnp.float32)  # noqa: E731
    m = np.arange(128)

    def operand(codes, scale, row, at, size):
        here = jnp.pad(number(codes), ((0, -len(codes) % size), (0, 0)))[row : row + size, at : at + tiles.depth]
        first = at // plan.group
        factors = [
            number(scale[row // 128 + m[:size] // 128, (first + b) // 4, m[:size] % 32, m[:size] // 32 * 4 + b % 4])
            for b in range(plan.groups)
        ]
        return here * jnp.repeat(jnp.stack(factors, 1), plan.group, axis=1)

    out = np.zeros((tiles.split, plan.bands * tiles.rows, plan.outputs), np.float32)
    for item in range(plan.items):
        column, band, part = (int(i) for i in gemm.place(item, plan))
        total = 0
        for k in range(plan.steps):
            at = gemm.start(part, k, plan)
            a = operand(w.codes, w.scale, column * 128, at, 128)
            b = operand(codes, x_scale, band * tiles.rows, at, tiles.rows)
            total += a @ b.T
        outputs, rows = slice(column * 128, column * 128 + 128), slice(band * tiles.rows, (band + 1) * tiles.rows)
        if w.outer is not None:
            pad = jnp.pad(x_outer, (0, plan.bands * tiles.rows - plan.rows))
            total = total * w.outer[outputs][:, None] * pad[rows][None]
        out[part, rows, outputs] += np.asarray(total.T)
    return out.sum(0)[: plan.rows]


@pytest.mark.parametrize("stored", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("rows", [16, 128])
def test_blocks_emulated(stored, rows):
    x, w = inputs(stored, rows=130, d=512, f=256)
    tiles = gemm.Tiles(rows=128, depth=256, stages=2, split=2, clip=False)
    if rows == 16:
        x, tiles = x[:9], dataclasses.replace(tiles, rows=16, split=1)
    form = formats.parse(stored)
    found = emulated(x, w, form, tiles)
    assert relative_error(jnp.asarray(found), reference.quant_matmul(*in_float32((x, w)), form)) < 1e-5


@pytest.mark.parametrize("stored", ["mxfp4", "nvfp4"])
def test_blocks_lower(stored):
    """The whole call but for the assembler; shapes and dtypes of the scales are checked there."""
    x, w = inputs(stored, rows=3, d=512)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(lambda x, w: blocks.quant_matmul(x, w, formats.parse(stored)))
    lowered = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(x, blocks.relayout(w))
    assert lowered.out_avals[0].shape == (3, 256) and "mosaic_gpu_v2" in lowered.mlir_module()


@pytest.mark.parametrize("module, stored", [(wide, s) for s in FORMATS] + [(blocks, "mxfp4"), (blocks, "nvfp4")])
def test_relayout_and_back(module, stored):
    _, w = inputs(stored)
    if stored == "mxfp4":  # the ends of its range
        w = dataclasses.replace(w, scale=w.scale.at[0, 0].set(0).at[1, 1].set(255))
    if stored == "nvfp4":
        w = dataclasses.replace(w, scale=w.scale.at[0, 0].set(0x7F))
    laid = module.relayout(w)
    back = laid.qtensor()
    assert jax.tree.structure(back) == jax.tree.structure(w) and laid.shape == w.shape and laid.ndim == 2
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))
    assert laid.nbytes <= 1.1 * w.nbytes  # zero points and scales of mxfp4 take two bytes


def abstract(stored, d=4096, f=24576):
    w = jax.ShapeDtypeStruct((d, f), jnp.bfloat16)
    return tensor.quantize(w, formats.parse(stored)) if stored else w


@pytest.mark.parametrize("rows", [1, 16, 64, 256, 4096])
def test_tiles_fit_an_sm(rows):
    for d, f in ((4096, 24576), (4096, 4096), (12288, 4096), (4096, 6144), (14336, 4096)):
        packed = [jax.eval_shape(wide.relayout, abstract(stored, d, f)) for stored in FORMATS]
        scaled = jax.eval_shape(blocks.relayout, abstract("nvfp4", d, f))
        plans = [(wide.plan_for(rows, w), jnp.bfloat16, w.codes.dtype, getattr(w.scale, "dtype", None)) for w in packed]
        plans += [(eight.plan_for(rows, abstract("int8", d, f)), jnp.int8, jnp.int8, None)]
        plans += [(blocks.plan_for(rows, scaled), scaled.codes.dtype, scaled.codes.dtype, scaled.scale.dtype)]
        for plan, *dtypes, scale in plans:
            tiles = plan.tiles
            stage = gemm.stage_bytes(plan, *dtypes, scale or jnp.bfloat16)
            assert tiles.stages >= 3 and plan.depth == plan.steps * tiles.depth * tiles.split
            assert tiles.stages % max(plan.wideners, 1) == 0, "a slot has one widener, or barriers lose their phase"
            assert stage * tiles.stages + gemm.out_bytes(tiles, 2 * min(tiles.split, 2)) < gemm.SHARED
            assert plan.tensor_columns <= gemm.COLUMNS


def test_supports_says_why():
    ask = lambda row, w, **more: row.supports({"weight": w, **more}, B200)  # noqa: E731
    assert ask(dense, abstract(None)) is None and "XLA is left" in ask(dense, abstract(None, f=1024))
    assert ask(wide, abstract("int4_g128")) is None
    assert "F of 128" in ask(wide, abstract("int4_g128", 4096, 448))
    assert "groups of 8" in ask(wide, abstract("int4_g8"))
    assert "allowed: as they are" in ask(wide, abstract("int4_g128"), activations=formats.parse("int8"))
    assert "one scale a row" in ask(eight, abstract("fp8_e4m3_g128"), activations=formats.parse("fp8_e4m3"))
    assert ask(eight, abstract("int8"), activations=formats.parse("int8")) is None
    assert ask(blocks, abstract("nvfp4"), activations=formats.parse("nvfp4")) is None
    assert "both nvfp4" in ask(blocks, abstract("mxfp4"), activations=formats.parse("nvfp4"))
    with pytest.raises(LoweringError, match="allowed: mxfp4, nvfp4"):
        blocks.quant_matmul(*inputs("nvfp4"))


@pytest.mark.parametrize("row", [row for row in dispatch.ROWS if not row.ran], ids=lambda row: f"{row.op}-{row.name}")
def test_rows_that_never_ran_say_so_and_can_be_left(row):
    target = next(t for t in TARGETS.values() if row.arch in (t.arch, "any") and t.platform == "gpu")
    item = next(item for item in registry.cases([row.op]) if row in registry.kernels(item, target))
    site = dispatch.OpSite(op=row.op, args=item.site)
    choice = dispatch.select(site, target)
    if str(choice) == row.name:
        assert choice.note.startswith(dispatch.NEVER_RUN)
    assert dispatch.select(site, target, require="xla").backend == "xla"


def test_e2m1_of_the_kernel_is_e2m1_of_the_format():
    codes = np.arange(16, dtype=np.uint8)
    data = jnp.asarray(codes[0::2] | (codes[1::2] << 4))[None]
    np.testing.assert_array_equal(wide.fp4_codes(data)[0].astype(jnp.float32), fp4.values(jnp.asarray(codes)))
