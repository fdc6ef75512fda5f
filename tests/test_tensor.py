"""Storage formats and `QTensor`: packed bytes against a numpy oracle, contraction against dequantized math."""

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optx import formats, tensor
from optx.errors import FormatError
from optx.formats import GGML, Float8, Int
from optx.ggml import BLOCKS
from optx.tensor import QTensor

D, F, GROUP = 32, 6, 8
INTS = [
    Int(width=width, group=group, symmetric=symmetric)
    for width in (8, 4, 3, 2)
    for group in (None, GROUP)
    for symmetric in (True, False)
]
FP8S = [Float8(kind=kind, group=group) for kind in ("e4m3", "e5m2") for group in (None, GROUP)]
ALL = [*INTS, *FP8S]
GGMLS = [GGML(block=name) for name in BLOCKS]
FLOAT16_AT = {  # bytes of a block at which a float16 lies: random ones would be infinite now and then
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
}
each = pytest.mark.parametrize("fmt", ALL, ids=str)


def encode(fmt, rows, how="jit"):
    """The rows' parts; as a QTensor where jitted, which has the same fields."""
    return fmt.encode(jnp.asarray(rows)) if how == "eager" else tensor.quantize(jnp.asarray(rows), fmt, axis=-1)


def decode(fmt, parts, dtype="float32", how="jit"):
    parts = formats.Parts(data=parts.data, scale=parts.scale, zero=parts.zero)
    if how == "eager":
        return fmt.decode(parts, D, jnp.dtype(dtype))
    return decode_jit(fmt, parts, D, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def decode_jit(fmt, parts, length, dtype):
    return fmt.decode(parts, length, dtype)


def by_group(rows, fmt):
    group = fmt.group or rows.shape[-1]
    return np.asarray(rows, np.float32).reshape(*rows.shape[:-1], -1, group)


def pack_bits(codes, widths):
    """Unsigned codes [..., D] -> bytes, a plane for each of `widths`, lowest bits of a code in the first plane."""
    planes, low = [], 0
    for width in widths:
        bits = (codes[..., None].astype(np.uint8) >> np.arange(low, low + width, dtype=np.uint8)) & 1
        planes.append(np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little"))
        low += width
    return np.concatenate(planes, axis=-1)


def int_scale(rows, fmt):
    """The scale by its rule, rounded to its stored type."""
    x = by_group(rows, fmt)
    if fmt.symmetric:
        scale = np.abs(x).max(-1) / ((2**fmt.width - 1) / 2)
    else:
        scale = (np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)) / (2**fmt.width - 1)
    return scale.astype(fmt.scale_dtype)


def int_codes(rows, fmt, scale):
    """(unsigned codes, zero points) by the documented rule, at a given stored scale."""
    x, levels = by_group(rows, fmt), 2**fmt.width - 1
    s = np.asarray(scale, np.float32)[..., None]
    if fmt.symmetric:
        zero = np.full_like(s, 2 ** (fmt.width - 1))
    else:
        zero = np.clip(np.rint(-np.minimum(x.min(-1, keepdims=True), 0) / s), 0, levels)
    codes = np.clip(np.rint(x / s) + zero, 0, levels).astype(np.int64)
    return codes, zero.astype(np.int64)


def assert_scale(got, want):
    """Equal to one unit in the last place: XLA turns a division by a constant into a product by its reciprocal."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    unsigned = {2: np.uint16, 4: np.uint32}[got.itemsize]
    assert np.abs(got.view(unsigned).astype(np.int64) - want.view(unsigned).astype(np.int64)).max() <= 1


@pytest.mark.parametrize("fmt, how", [*((fmt, "jit") for fmt in INTS), (INTS[7], "eager"), (INTS[8], "eager")], ids=str)
def test_int_codes_bytes_and_values(fmt, how, rng):
    rows = rng.normal(size=(F, D)).astype(np.float32)
    parts = encode(fmt, rows, how)
    assert_scale(parts.scale, int_scale(rows, fmt))
    codes, zero = int_codes(rows, fmt, parts.scale)
    flat = codes.reshape(rows.shape)
    if fmt.width == 8:
        want = (flat - 128).astype(np.int8) if fmt.symmetric else flat.astype(np.uint8)
    else:
        want = pack_bits(flat, {4: [4], 3: [2, 1], 2: [2]}[fmt.width])
    assert parts.data.dtype == want.dtype
    np.testing.assert_array_equal(parts.data, want)
    if fmt.symmetric:
        assert parts.zero is None
    else:
        assert parts.zero.dtype == jnp.uint8
        np.testing.assert_array_equal(parts.zero, zero[..., 0])
    values = (codes - zero).astype(np.float32) * np.asarray(parts.scale, np.float32)[..., None]
    np.testing.assert_array_equal(decode(fmt, parts, how=how), values.reshape(rows.shape))


@pytest.mark.parametrize("fmt, how", [*((fmt, "jit") for fmt in FP8S), (FP8S[1], "eager")], ids=str)
def test_fp8_codes_and_values(fmt, how, rng):
    rows = rng.normal(size=(F, D)).astype(np.float32)
    parts = encode(fmt, rows, how)
    storage = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[fmt.kind]
    top = {"e4m3": 448, "e5m2": 57344}[fmt.kind]
    x = by_group(rows, fmt)
    assert_scale(parts.scale, np.abs(x).max(-1) / np.float32(top))
    s = np.asarray(parts.scale)[..., None]
    codes = np.clip(x / s, -top, top).astype(storage)
    assert parts.data.dtype == storage and parts.zero is None
    np.testing.assert_array_equal(np.asarray(parts.data).view(np.uint8), codes.reshape(rows.shape).view(np.uint8))
    np.testing.assert_array_equal(decode(fmt, parts, how=how), (codes.astype(np.float32) * s).reshape(rows.shape))


@each
def test_error_is_at_most_half_a_step(fmt, rng):
    rows = rng.normal(size=(F, D)).astype(np.float32)
    parts = encode(fmt, rows)
    error = np.abs(by_group(decode(fmt, parts), fmt) - by_group(rows, fmt))
    s = np.asarray(parts.scale, np.float32)[..., None]
    if isinstance(fmt, Int):
        # The largest positive number of a symmetric group and the clipped end of a shifted one lose up to one step.
        assert error.max() <= s.max() * 1.01
        assert (error <= 0.5001 * s).mean() > 0.8
    else:
        digits = {"e4m3": 3, "e5m2": 2}[fmt.kind]
        assert (error <= np.abs(by_group(rows, fmt)) * 2.0 ** -(digits + 1) + s * 1e-2).all()


@each
def test_rounding_twice_is_rounding_once(fmt, rng):
    """Codes of a dequantized tensor are its codes again, where its range is: fp8 always, integers with both ends used.

    A symmetric group ends at code 2^(b-1)-1 or -2^(b-1), never at (2^b - 1) / 2, so there only the bound holds.
    """
    rows = rng.normal(size=(F, D)).astype(np.float32)
    once = encode(fmt, rows)
    values = np.asarray(decode(fmt, once))
    twice = encode(fmt, values)
    if isinstance(fmt, Float8):
        np.testing.assert_array_equal(np.asarray(twice.data).view(np.uint8), np.asarray(once.data).view(np.uint8))
        return
    step = np.asarray(once.scale, np.float32)[..., None]
    moved = np.abs(by_group(decode(fmt, twice), fmt) - by_group(values, fmt))
    assert (moved <= 1.001 * step).all()
    if fmt.symmetric:
        return
    codes, _ = int_codes(rows, fmt, once.scale)
    full = (codes.min(-1) == 0) & (codes.max(-1) == 2**fmt.width - 1)
    assert full.sum() >= 0.5 * full.size
    again, _ = int_codes(values, fmt, twice.scale)
    np.testing.assert_array_equal(again[full], codes[full])
    np.testing.assert_array_equal(np.asarray(twice.zero)[full], np.asarray(once.zero)[full])


@each
def test_zero_groups_stay_zero_with_a_unit_scale(fmt, rng):
    rows = rng.normal(size=(F, D)).astype(np.float32)
    rows[1] = 0
    parts = encode(fmt, rows)
    np.testing.assert_array_equal(decode(fmt, parts)[1], np.zeros(D))
    np.testing.assert_array_equal(parts.scale[1], np.ones_like(parts.scale[1]))


@each
def test_what_is_not_finite_stays_visible(fmt, rng):
    rows = rng.normal(size=(F, D)).astype(np.float32)
    rows[[0, 1, 2], 3] = np.nan, np.inf, -np.inf
    values = np.asarray(decode(fmt, encode(fmt, rows)))
    assert not np.isfinite(values[:3, 3]).any()
    assert np.isfinite(values[3:]).all()


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("fmt", [Int(width=8), Int(width=4, symmetric=False), *FP8S[::2]], ids=str)
def test_sizes_at_the_ends_of_the_scale(fmt, scale_dtype):
    """Never NaN and never a zero scale; right to a few percent wherever the scale's type reaches."""
    fmt = dataclasses.replace(fmt, scale_dtype=scale_dtype)
    sizes = np.asarray([1e-38, 1e-30, 1e-8, 1e-4, 1e4, 1e30])
    rows = (sizes[:, None] * np.linspace(-1, 1, D)).astype(np.float32)
    parts = encode(fmt, rows)
    values = np.asarray(decode(fmt, parts))
    assert np.isfinite(values).all()
    assert (np.asarray(parts.scale, np.float32) > 0).all()
    top = 57344 if "e5m2" in str(fmt) else 448 if isinstance(fmt, Float8) else 2**fmt.width - 1
    info = ml_dtypes.finfo(scale_dtype)
    fits = (4 * float(info.smallest_normal) < sizes / top) & (sizes / top < float(info.max)) & (sizes > 1e-31)
    assert fits.sum() >= 1
    assert (np.abs(values - rows).max(-1) <= 0.13 * sizes)[fits].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fmt", ALL[1::3], ids=str)
def test_decode_rounds_once_to_the_tensors_type(fmt, dtype, rng):
    """The product of code and scale is formed in float32: a small float32 scale does not vanish in float16."""
    rows = 1e-4 * rng.normal(size=(F, D)).astype(np.float32)
    parts = encode(fmt, rows)
    want = np.asarray(decode(fmt, parts)).astype(dtype)
    got = decode(fmt, parts, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize(
    "text, length, bits",
    [
        ("int8", 128, 8 + 16 / 128),
        ("int4_g64", 128, 4.25),
        ("int4_g64_asym", 128, 4.25 + 8 / 64),
        ("int3_g32", 128, 3.5),
        ("int2_g16_asym", 128, 2 + 16 / 16 + 8 / 16),
        ("fp8_e4m3", 64, 8 + 32 / 64),
        ("fp8_e5m2_g32", 64, 9),
        ("q4_0", 256, 4.5),
        ("q4_1", 256, 5),
        ("q8_0", 256, 8.5),
        ("q6_k", 256, 6.5625),
    ],
)
def test_bits_count_scales_and_zero_points(text, length, bits):
    fmt = formats.parse(text)
    assert fmt.bits(length) == bits
    if fmt.can_encode:
        weight = tensor.quantize(jax.ShapeDtypeStruct((length, F), jnp.bfloat16), fmt)
        assert weight.bits_per_weight == bits
        assert weight.nbytes == tensor.nbytes(weight) == length * F * bits / 8


@pytest.mark.parametrize("axis", [-1, -2])
@each
def test_layout_and_abstract_form(fmt, axis, rng):
    """The packed axis lies last; abstract quantization gives the very structure, shapes and types of the concrete."""
    x = rng.normal(size=(2, D, F) if axis == -2 else (F, D)).astype(np.float32)
    packed = tensor.quantize(jnp.asarray(x), fmt, axis=axis)
    assert packed.shape == x.shape and packed.ndim == x.ndim and packed.size == x.size and packed.dtype == jnp.float32
    rows = x if axis == -1 else x.swapaxes(-1, -2)
    assert packed.data.shape == (*rows.shape[:-1], fmt.packed(D))
    assert packed.scale.shape == (*rows.shape[:-1], fmt.grouped(D))
    packed.validate()
    np.testing.assert_array_equal(packed.rows(), decode(fmt, encode(fmt, rows)))
    abstract = tensor.quantize(jax.ShapeDtypeStruct(x.shape, x.dtype), fmt, axis=axis)
    assert jax.tree.structure(abstract) == jax.tree.structure(packed)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(packed)
    ]
    assert (abstract.shape, abstract.nbytes, abstract.bits_per_weight) == (
        packed.shape,
        packed.nbytes,
        packed.bits_per_weight,
    )


def test_transpose_moves_nothing(rng):
    packed = tensor.quantize(jnp.asarray(rng.normal(size=(D, F)), jnp.float32), Int(width=4, group=GROUP))
    turned = packed.T
    assert turned.data is packed.data and turned.scale is packed.scale
    assert turned.shape == (F, D) and turned.axis == -1
    np.testing.assert_array_equal(turned.dequantize(), packed.dequantize().T)
    assert jax.tree.structure(turned.T) == jax.tree.structure(packed)


def test_vector_has_a_shape(rng):
    packed = tensor.quantize(jnp.asarray(rng.normal(size=D), jnp.float32), Int(width=8), axis=-1)
    assert packed.shape == (D,) and packed.dequantize().shape == (D,)


@pytest.mark.parametrize("text", [None, "int8", "int4_g8_asym", "int3_g8", "fp8_e4m3_g8"])
def test_contractions_equal_dequantized_math(text, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32)
    ids = jnp.asarray([[0, 3], [F - 1, 3]])
    w = jnp.asarray(rng.normal(size=(D, F)), jnp.float32)
    if text is not None:
        w = tensor.quantize(w, formats.parse(text))
    plain = np.asarray(tensor.dense(w), np.float64)
    want = np.asarray(x, np.float64) @ plain
    np.testing.assert_allclose(jax.jit(tensor.matmul)(x, w), want, atol=1e-4)
    np.testing.assert_allclose(
        jax.jit(lambda x, w: tensor.einsum("btd,df->bft", x, w))(x, w), want.swapaxes(1, 2), atol=1e-4
    )
    np.testing.assert_array_equal(jax.jit(tensor.take)(w.T, ids), plain.T[np.asarray(ids)].astype(np.float32))
    few = x[:, :2]  # few rows are contracted the other way round
    np.testing.assert_allclose(jax.jit(tensor.matmul)(few, w), want[:, :2], atol=1e-4)
    np.testing.assert_allclose(jax.jit(tensor.matmul)(x[0, 0], w), want[0, 0], atol=1e-4)
    low = x.astype(jnp.bfloat16)
    out = jax.jit(tensor.matmul)(low, w)
    assert out.dtype == jnp.bfloat16, "activations keep their type"
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.3)


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 5, D)])
def test_matmul_against_rows(shape, rng):
    x, rows = rng.normal(size=shape).astype(np.float32), rng.normal(size=(F, D)).astype(np.float32)
    np.testing.assert_allclose(tensor.matmul_rows(jnp.asarray(x), jnp.asarray(rows)), x @ rows.T, atol=1e-4)


def test_batched_matmul_of_stacked_weights(rng):
    x = jnp.asarray(rng.normal(size=(3, 5, D)), jnp.float32)
    w = tensor.quantize(jnp.asarray(rng.normal(size=(3, D, F)), jnp.float32), Int(width=4, group=GROUP))
    np.testing.assert_allclose(tensor.matmul(x, w), np.asarray(x) @ np.asarray(w.dequantize()), atol=1e-4)


def test_take_clips_ids_like_a_dense_table(rng):
    table = jnp.asarray(rng.normal(size=(F, D)), jnp.float32)
    ids = jnp.asarray([F + 5, F - 1])
    for w in (table, tensor.quantize(table, Int(width=8), axis=-1)):
        rows = np.asarray(tensor.take(w, ids))
        np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize("name", BLOCKS)
def test_ggml_blocks_against_the_gguf_package(name, rng):
    """Random bytes with finite scales, as a weight [D, F] that lies as its file does: rows of D packed numbers."""
    block, rows = BLOCKS[name], 3
    data = rng.integers(0, 256, size=(rows, 2, block.bytes), dtype=np.uint8)
    for at in FLOAT16_AT.get(name, ()):
        data[..., at : at + 2] = rng.normal(size=(rows, 2, 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = rng.integers(110, 140, size=(rows, 2))  # a power of two; XLA flushes float32 subnormals
    data = data.reshape(rows, -1)
    want = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    weight = QTensor(data=jnp.asarray(data), format=GGML(block=name), length=2 * block.elements)
    weight.validate()
    assert weight.shape == (2 * block.elements, rows)
    assert weight.bits_per_weight == weight.format.bits(weight.length) == 8 * block.bytes / block.elements
    np.testing.assert_array_equal(weight.rows(), want)
    np.testing.assert_array_equal(jax.jit(lambda w: w.dequantize())(weight), want.T)
    x = rng.normal(size=(2, weight.length)).astype(np.float32)
    np.testing.assert_allclose(
        tensor.matmul(jnp.asarray(x), weight), x @ want.T, rtol=1e-4, atol=1e-2 * np.abs(want).max()
    )
    np.testing.assert_array_equal(tensor.take(weight.T, jnp.asarray([2, 0])), want[[2, 0]])


@pytest.mark.parametrize("fmt", [*ALL, *GGMLS], ids=str)
def test_names_round_trip(fmt):
    assert formats.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    "text, told",
    [
        ("itn4", "did you mean 'int4'"),
        ("int4_g64_aysm", "allowed: codebook1, .*, fp8_block, fp8_e4m3"),
        ("fp8_e4m2", "did you mean 'fp8_e"),
        ("fp8_e4m3_asym", "did you mean 'fp8_e4m3'"),
        ("q4_k_m", "did you mean 'q4_k'"),
        ("nothing", "allowed: codebook1, .*, fp8_block, fp8_e4m3"),
        ("int5", "width 5; allowed: 2, 3, 4, 8"),
        ("int4_g0", "group 0"),
        ("fp8_e4m3_g0", "group 0"),
    ],
)
def test_unknown_names_are_told_with_what_is_near(text, told):
    with pytest.raises(FormatError, match=told):
        formats.parse(text)


@pytest.mark.parametrize(
    "build, told",
    [
        (lambda: tensor.quantize(jnp.ones((D, F)), Int(width=4, group=12)), "32 is not a multiple of the group 12"),
        (lambda: tensor.quantize(jnp.ones((D, F)), Float8(group=12)), "32 is not a multiple of the group 12"),
        (lambda: tensor.quantize(jnp.ones((12, F)), Int(width=3)), "12 is not a multiple of 8"),
        (lambda: tensor.quantize(jnp.ones((6, F)), Int(width=2)), "6 is not a multiple of 4"),
        (lambda: tensor.quantize(jnp.ones((3, F)), Int(width=4)), "3 is not a multiple of 2"),
        (lambda: tensor.quantize(jnp.ones((D, F)), Int(width=4), axis=0), "axis 0; allowed: -1 .*-2"),
        (lambda: tensor.quantize(jnp.ones((D, F)), GGML(block="Q4_0")), "reads but does not write.*int4"),
        (lambda: Float8(kind="e3m4"), "'e3m4'; allowed: e4m3, e5m2"),
        (lambda: Float8(group=-1), "group -1"),
    ],
)
def test_what_cannot_be_stored_is_refused(build, told):
    with pytest.raises(FormatError, match=told):
        build()


def test_wrong_axis_is_refused():
    table = tensor.quantize(jnp.ones((F, D)), Int(width=8), axis=-1)
    with pytest.raises(FormatError, match=r"\(6, 32\) is packed along its last axis.*w\.T"):
        tensor.matmul(jnp.ones((2, F)), table)
    with pytest.raises(FormatError, match="pack a table along its last axis"):
        tensor.take(table.T, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize(
    "text, changes, told",
    [
        ("int4_g8", {"data": (F, 15)}, r"data\[\.\.\., 16\], got \(6, 15\)"),
        ("int4_g8", {"scale": (F, 3)}, r"scale\[6, 4\], got \(6, 3\)"),
        ("int4_g8", {"scale": (F + 1, 4)}, "scale"),
        ("int4_g8", {"scale": None}, "needs a scale"),
        ("int4_g8", {"zero": (F, 4)}, "has no zero"),
        ("int4_g8_asym", {"zero": None}, "needs a zero"),
        ("int4_g8_asym", {"zero": (F, 1)}, r"zero\[6, 4\], got \(6, 1\)"),
        ("fp8_e4m3", {"zero": (F, 1)}, "has no zero"),
        ("fp8_e4m3", {"length": 16}, r"data\[\.\.\., 16\]"),
        ("q8_0", {"scale": (F, 1)}, "scale"),
    ],
)
def test_validate_names_the_part_that_does_not_fit(text, changes, told):
    fmt = formats.parse(text)
    if fmt.can_encode:
        good = tensor.quantize(jnp.ones((D, F)), fmt)
    else:
        good = QTensor(data=jnp.zeros((F, fmt.packed(D)), jnp.uint8), format=fmt, length=D)
    good.validate()
    parts = {name: jnp.zeros(to) if isinstance(to, tuple) else to for name, to in changes.items()}
    with pytest.raises(FormatError, match=f"layers/0/q: .*{told}"):
        dataclasses.replace(good, **parts).validate("layers/0/q")
