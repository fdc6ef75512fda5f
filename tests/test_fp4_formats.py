"""MXFP4 and NVFP4: codes and scales against ml_dtypes, what is stored, and what a QTensor of them can do."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optx import formats, tensor
from optx.errors import FormatError
from optx.formats import GGML, Float4, fp4
from optx.nn.core import Linear

D, F = 96, 6
MX, NV = Float4(kind="mx"), Float4(kind="nv")
both = pytest.mark.parametrize("fmt", [MX, NV], ids=str)
E2M1, E8M0, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn


def numbers(rng, shape=(F, D)):
    """Rows and blocks of very different sizes."""
    sizes = np.exp2(rng.integers(-12, 12, size=(*shape[:-1], shape[-1] // 16, 1)))
    return (rng.normal(size=(*shape[:-1], shape[-1] // 16, 16)) * sizes).reshape(shape).astype(np.float32)


def oracle(fmt, rows):
    """(codes as ml_dtypes e2m1 [F, blocks, block], factor of a block float64 [F, blocks], scale bytes) by the documents."""
    x = rows.astype(np.float64).reshape(len(rows), -1, fmt.group)
    absmax = np.abs(x).max(-1)
    if fmt.kind == "mx":
        scale = np.exp2(np.floor(np.log2(absmax)) - 2).astype(E8M0)
        factor, stored = scale.astype(np.float64), scale.view(np.uint8)
    else:
        outer = (absmax.max(-1, keepdims=True) / (6 * 448)).astype(np.float32)
        block = np.clip((absmax / 6 / outer).astype(np.float32), 2.0**-9, 448).astype(E4M3)
        factor = block.astype(np.float64) * outer
        stored = np.concatenate([block.view(np.uint8), outer.astype("<f4").view(np.uint8)], axis=-1)
    codes = np.clip((x / factor[..., None]).astype(np.float32), -6, 6).astype(E2M1)
    return codes, factor, stored


@both
def test_codes_scales_and_values(fmt, rng):
    rows = numbers(rng)
    packed = tensor.quantize(jnp.asarray(rows), fmt, axis=-1)
    codes, factor, stored = oracle(fmt, rows)
    assert packed.data.dtype == packed.scale.dtype == jnp.uint8 and packed.zero is None
    if fmt.kind == "nv":  # XLA divides by a constant through its reciprocal: one unit of the outer scale
        outer, got = stored[..., -4:].copy().view("<i4"), np.asarray(packed.scale)[..., -4:].copy().view("<i4")
        assert np.abs(outer - got).max() <= 1
        np.testing.assert_array_equal(packed.scale[..., :-4], stored[..., :-4])
    else:
        np.testing.assert_array_equal(packed.scale, stored)
    bytes_ = codes.view(np.uint8).reshape(F, D) & 15
    same = np.asarray(packed.data) == bytes_[:, 0::2] | (bytes_[:, 1::2] << 4)
    assert same.all() if fmt.kind == "mx" else same.mean() > 0.99
    values = (codes.astype(np.float64) * factor[..., None]).reshape(F, D)
    if fmt.kind == "mx":
        np.testing.assert_array_equal(packed.rows(), values.astype(np.float32))
    else:
        np.testing.assert_allclose(packed.rows()[..., :], values, rtol=3e-7, atol=2e-3 * np.abs(values).max())


def test_every_code_stands_for_the_number_of_ml_dtypes():
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(fp4.values(jnp.asarray(codes)), codes.view(E2M1).astype(np.float32))


def test_rounding_to_nearest_even():
    """Every grid point, every middle between two, and numbers just beside the middles."""
    grid = np.arange(8, dtype=np.uint8).view(E2M1).astype(np.float32)
    middles = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, middles, np.nextafter(middles, 0), np.nextafter(middles, 9), [5.9, 7, 100]])
    x = np.concatenate([x, -x]).astype(np.float32)
    want = np.clip(x, -6, 6).astype(E2M1).view(np.uint8) & 15
    np.testing.assert_array_equal(fp4.codes(jnp.asarray(x)), want)


def test_every_e8m0_byte():
    """Powers of two of ml_dtypes; what float32 holds as a subnormal may come as zero."""
    byte = np.arange(256, dtype=np.uint8)
    want = byte.view(E8M0).astype(np.float32)
    got = np.asarray(jax.jit(fp4.mx_factor)(jnp.asarray(byte)))
    np.testing.assert_array_equal(got[1:], want[1:])
    assert got[0] in (0, want[0])


def test_the_shared_exponent_at_its_ends():
    """floor(log2 absmax) - 2, exact beside powers of two, never a subnormal."""
    absmax = np.asarray([1, np.nextafter(np.float32(2), 0), 2, 7.99, 8, 3e38, 2e-38, 0, np.nan, np.inf], np.float32)
    got = jax.jit(fp4.mx_scale)(jnp.asarray(absmax))
    np.testing.assert_array_equal(got, [125, 125, 126, 127, 128, 252, 1, 127, 255, 255])


@both
def test_error_is_bounded_by_the_grid(fmt, rng):
    """Steps of the grid are 2 at the top; mx saturates numbers between 6 and 8 times its scale."""
    rows = rng.normal(size=(F, D)).astype(np.float32)
    error = np.abs(np.asarray(tensor.quantize(jnp.asarray(rows), fmt, axis=-1).rows()) - rows)
    absmax = np.abs(rows).reshape(F, -1, fmt.group).max(-1).repeat(fmt.group, -1)
    assert (error <= absmax * (0.251 if fmt.kind == "mx" else 0.18)).all()
    assert np.linalg.norm(error) / np.linalg.norm(rows) < (0.16 if fmt.kind == "mx" else 0.12)


@both
def test_rounding_twice_is_rounding_once(fmt, rng):
    once = tensor.quantize(jnp.asarray(numbers(rng)), fmt, axis=-1)
    twice = tensor.quantize(once.rows(), fmt, axis=-1)
    if fmt.kind == "mx":
        np.testing.assert_array_equal(twice.rows(), once.rows())
    else:  # the largest number of a block may have moved, and its scale with it
        assert np.linalg.norm(twice.rows() - once.rows()) < 0.05 * np.linalg.norm(once.rows())


@both
def test_zeros_and_what_is_not_finite(fmt, rng):
    rows = rng.normal(size=(F, D)).astype(np.float32)
    rows[0] = 0
    rows[1, :32] = 0
    rows[2, 3], rows[3, 40], rows[4, 95] = np.nan, np.inf, -np.inf
    packed = tensor.quantize(jnp.asarray(rows), fmt, axis=-1)
    values = np.asarray(packed.rows())
    assert (values[0] == 0).all() and (values[1, :32] == 0).all()
    one = {"mx": 127, "nv": 0x38}[fmt.kind]
    assert (np.asarray(packed.scale)[0, : D // fmt.group] == one).all()
    for row, at in ((2, 3), (3, 40), (4, 95)):
        block = slice(at // fmt.group * fmt.group, (at // fmt.group + 1) * fmt.group)
        finite = np.isfinite(values[row])
        assert not finite[block].any() and finite.sum() == D - fmt.group
    assert np.isfinite(values[[0, 1, 5]]).all()


@both
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-6, 1e6, 1e30, 1e37])
def test_sizes_at_the_ends_of_float32(fmt, size):
    rows = (size * np.linspace(-1, 1, D)).astype(np.float32)[None]
    values = np.asarray(tensor.quantize(jnp.asarray(rows), fmt, axis=-1).rows())
    assert np.isfinite(values).all()
    if size > 1e-36:
        assert np.abs(values - rows).max() < 0.26 * size


@both
def test_names_bits_and_axes(fmt):
    assert formats.parse(str(fmt)) == fmt and str(fmt) in formats.NAMES
    assert formats.parse(f"{fmt}_g{fmt.group}") == fmt
    assert formats.writable(str(fmt), group=None) == fmt == dataclasses.replace(fmt, group=None)
    assert fmt.bits(D) == {"mx": 4.25, "nv": 4.5 + 32 / D}[fmt.kind]
    assert fmt.check(D) is None and fmt.check(24) == f"{fmt}: axis of 24 is not a multiple of its block of {fmt.group}"
    weight = tensor.quantize(jax.ShapeDtypeStruct((D, F), jnp.bfloat16), fmt)
    assert weight.bits_per_weight == fmt.bits(D)


def test_the_block_of_a_gguf_file_keeps_its_own_name():
    block = GGML(block="MXFP4")
    assert str(block) == "gguf_mxfp4" and formats.parse("gguf_mxfp4") == formats.parse("MXFP4") == block != MX


def test_the_same_numbers_as_the_blocks_of_a_gguf_file(rng):
    """GGML keeps the scale with its block and numbers 0..15 in the low nibbles; the values are the same."""
    ours = tensor.quantize(jnp.asarray(numbers(rng)), MX, axis=-1)
    data = np.asarray(ours.data).reshape(F, -1, 16)
    codes = np.stack([data & 15, data >> 4], axis=-1).reshape(F, -1, 32)
    blocks = np.concatenate([np.asarray(ours.scale)[..., None], codes[..., :16] | (codes[..., 16:] << 4)], axis=-1)
    parts = formats.Parts(data=jnp.asarray(blocks.reshape(F, -1)))
    np.testing.assert_array_equal(GGML(block="MXFP4").decode(parts, D, jnp.float32), ours.rows())


@both
@pytest.mark.parametrize("axis", [-1, -2])
def test_abstract_form(fmt, axis, rng):
    x = numbers(rng, (2, F, D))
    x = x if axis == -1 else x.swapaxes(-1, -2)
    packed = tensor.quantize(jnp.asarray(x), fmt, axis=axis)
    packed.validate()
    assert packed.shape == x.shape and packed.scale.shape == (2, F, fmt.grouped(D))
    abstract = tensor.quantize(jax.ShapeDtypeStruct(x.shape, x.dtype), fmt, axis=axis)
    assert jax.tree.structure(abstract) == jax.tree.structure(packed) and abstract.nbytes == packed.nbytes
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(packed)
    ]


@both
def test_experts_under_vmap(fmt, rng):
    x, w = rng.normal(size=(3, 5, D)).astype(np.float32), numbers(rng, (3, F, D)).swapaxes(-1, -2)
    packed = jax.vmap(lambda w: tensor.quantize(w, fmt))(jnp.asarray(w))
    single = [tensor.quantize(jnp.asarray(one), fmt) for one in w]
    got = jax.jit(jax.vmap(tensor.matmul))(jnp.asarray(x), packed)
    for i, one in enumerate(single):
        np.testing.assert_array_equal(packed.data[i], one.data)
        np.testing.assert_array_equal(packed.scale[i], one.scale)
        want = x[i].astype(np.float64) @ np.asarray(one.dequantize(), np.float64)
        np.testing.assert_allclose(got[i], want, atol=1e-4 * np.abs(want).max())


@both
def test_a_linear_splits_along_outputs(fmt, rng):
    linear = Linear(D, F, bias=False)
    whole = tensor.quantize(jnp.asarray(numbers(rng).T), fmt)
    linear.weight.set_value(whole)
    parts = [part.weight.get_value() for part in linear.split([2, 4])]
    for part in parts:
        part.validate()
    np.testing.assert_array_equal(jnp.concatenate([p.dequantize() for p in parts], axis=1), whole.dequantize())


@both
def test_rows_of_a_table(fmt, rng):
    table = tensor.quantize(jnp.asarray(numbers(rng)), fmt, axis=-1)
    np.testing.assert_array_equal(tensor.take(table, jnp.asarray([4, 0])), table.dequantize()[jnp.asarray([4, 0])])


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decode_rounds_once_to_the_tensors_type(fmt, dtype, rng):
    packed = tensor.quantize(jnp.asarray(rng.normal(size=(F, D)), jnp.float32), fmt, axis=-1)
    low = dataclasses.replace(packed, dtype=jnp.dtype(dtype)).rows()
    assert low.dtype == dtype
    np.testing.assert_array_equal(low, packed.rows().astype(dtype))


def test_a_scale_a_tensor_is_repeated_for_its_rows(rng):
    """ModelOpt's files: e4m3 a block, one float32 a tensor."""
    blocks, outer = rng.uniform(0.1, 400, size=(F, D // 16)).astype(E4M3), np.float32(1.7e-4)
    data = rng.integers(0, 256, size=(F, D // 2), dtype=np.uint8)
    scale = fp4.nv_join(jnp.asarray(blocks), jnp.full((F, 1), outer))
    weight = tensor.QTensor(data=jnp.asarray(data), scale=scale, format=NV, length=D)
    weight.validate()
    codes = np.stack([data & 15, data >> 4], axis=-1).reshape(F, -1, 16).view(E2M1).astype(np.float32)
    want = codes * blocks.astype(np.float32)[..., None] * outer
    np.testing.assert_array_equal(weight.rows(), want.reshape(F, D))


@pytest.mark.parametrize(
    "build, told",
    [
        (lambda: Float4(kind="xx"), "'xx'; allowed: mx, nv"),
        (lambda: Float4(kind="mx", group=16), "mxfp4: group 16; allowed: 32"),
        (lambda: formats.parse("nvfp4_g32"), "nvfp4: group 32; allowed: 16"),
        (lambda: formats.parse("mxfp4_asym"), "did you mean"),
        (lambda: formats.parse("mxfp5"), "did you mean 'mxfp4'"),
        (lambda: formats.writable("nvfp4", symmetric=False), "nvfp4 has no zero point; set symmetric: true"),
        (lambda: tensor.quantize(jnp.ones((48, F)), MX), "48 is not a multiple of its block of 32"),
    ],
)
def test_what_cannot_be_is_refused(build, told):
    with pytest.raises(FormatError, match=told):
        build()
