"""Codebooks: centroids against the theory, packed bytes, exact lengths, and why the QJL residual is off by default."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, tensor
from optx.errors import FormatError
from optx.formats import Codebook, CodebookQJL, Int
from optx.formats.codebook import centroids
from optx.hadamard import Rotation

DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # mean squared error for N(0, 1), Max 1960, table I
widths = pytest.mark.parametrize("width", DISTORTION)
every = pytest.mark.parametrize("fmt", [*map(parse := formats.parse, formats.CODEBOOKS)], ids=str)


def stored(fmt, x) -> np.ndarray:
    return np.asarray(tensor.quantize(jnp.asarray(x), fmt, axis=-1).dequantize())


def distortion(got, want) -> float:
    return float(np.mean(np.sum((got - want) ** 2, -1) / np.sum(want**2, -1)))


@widths
def test_centroids_are_those_of_lloyd_and_max(width):
    """The distortion of the theory, by quadrature over the density; each centroid is the mean of its cell."""
    code = centroids(width)
    x = np.linspace(-8, 8, 40_001)
    p = np.exp(-x * x / 2) / np.sqrt(2 * np.pi) * (x[1] - x[0])
    nearest = np.abs(x[:, None] - code).argmin(1)
    assert np.sum(p * (x - code[nearest]) ** 2) == pytest.approx(DISTORTION[width], rel=5e-4)
    means = np.bincount(nearest, p * x) / np.bincount(nearest, p)
    np.testing.assert_allclose(means, code, atol=1e-3)
    np.testing.assert_allclose(code, -code[::-1], atol=1e-12)


def test_one_and_two_bits_as_published():
    np.testing.assert_allclose(centroids(1), [-np.sqrt(2 / np.pi), np.sqrt(2 / np.pi)], atol=1e-12)
    np.testing.assert_allclose(centroids(2)[2:], [0.4528, 1.510], atol=5e-4)  # Max 1960, table I


@widths
def test_codes_bytes_and_values(width, rng):
    x = rng.normal(size=(5, 3, 64)).astype(np.float32) * np.exp2(rng.integers(-6, 6, size=(5, 3, 1)))
    packed = tensor.quantize(jnp.asarray(x), Codebook(width=width), axis=-1)
    code = centroids(width)
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) * 8
    codes = np.abs(unit[..., None] - code).argmin(-1)
    planes = [(codes & 3, 2), (codes >> 2, 1)] if width == 3 else [(codes, width)]
    bits = [((c[..., None] >> np.arange(w)) & 1).reshape(5, 3, -1) for c, w in planes]
    want = np.concatenate([np.packbits(b, axis=-1, bitorder="little") for b in bits], axis=-1)
    np.testing.assert_array_equal(packed.data, want)
    scale = np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(code[codes], axis=-1, keepdims=True)
    assert packed.scale.dtype == jnp.float16
    np.testing.assert_allclose(packed.scale, scale, rtol=1e-3)
    values = code[codes] * np.asarray(packed.scale, np.float64)
    np.testing.assert_allclose(packed.dequantize(), values, rtol=1e-6)


@widths
def test_error_of_rotated_vectors_is_the_theorys(width, rng):
    """Vectors with outlier channels, head size 128, turned at random: |x' - x|^2 / |x|^2 within 5% of what follows from the
    distortion D of N(0, 1) when centroids, of length sqrt(1 - D), get the full length: 2 (1 - sqrt(1 - D))."""
    x = rng.normal(size=(1000, 128)).astype(np.float32)
    x[:, [5, 77]] *= 3
    turned = np.asarray(Rotation(d=128, seed=0)(jnp.asarray(x)))
    want = 2 * (1 - np.sqrt(1 - DISTORTION[width]))
    assert distortion(stored(Codebook(width=width), turned), turned) == pytest.approx(want, rel=0.05)
    assert want == pytest.approx(DISTORTION[width], rel=0.13)


@widths
def test_lengths_are_exact(width, rng):
    """Norm correction: to the rounding of a float16 scale; by |x| / sqrt(H) they would be sqrt(1 - D) of it."""
    x = rng.normal(size=(200, 128)).astype(np.float32)
    ratio = np.linalg.norm(stored(Codebook(width=width), x), axis=-1) / np.linalg.norm(x, axis=-1)
    assert np.abs(ratio - 1).max() < 6e-4


def test_channels_with_outliers_need_the_rotation(rng):
    """What the codebook is made for, and that it beats integers of as many bits there: 2 and 3 bits, head size 128."""
    x = rng.normal(size=(500, 128)).astype(np.float32)
    x[:, rng.choice(128, 12, replace=False)] *= 8
    turned = np.asarray(Rotation(d=128, seed=0)(jnp.asarray(x)))
    for width in (2, 3):
        own, plain = Codebook(width=width), Int(width=width, symmetric=False)
        error = distortion(stored(own, turned), turned)
        assert error < 0.5 * distortion(stored(own, x), x)
        assert error < 0.8 * distortion(stored(plain, turned), turned)


@every
def test_names_and_bits(fmt, rng):
    assert parse(str(fmt)) == fmt
    packed = tensor.quantize(jnp.asarray(rng.normal(size=(3, 128)), jnp.float32), fmt, axis=-1)
    packed.validate()
    scales = 2 if isinstance(fmt, CodebookQJL) else 1
    assert packed.bits_per_weight == fmt.bits(128) == fmt.width + 16 * scales / 128


@every
def test_zeros_and_numbers_that_are_none(fmt):
    x = np.zeros((3, 16), np.float32)
    x[1, 3], x[2, 5] = np.nan, np.inf
    got = stored(fmt, x)
    assert (got[0] == 0).all() and np.isnan(got[1]).all() and np.isnan(got[2]).all()


@every
def test_sizes_of_vectors(fmt, rng):
    """Very small and very large ones, in float32 and bfloat16."""
    x = rng.normal(size=(1, 64)).astype(np.float32)
    for size in (1e-3, 3e4):
        one = stored(fmt, x * size) / size
        np.testing.assert_allclose(one, stored(fmt, x), atol=4e-3)
    half = tensor.quantize(jnp.asarray(x, jnp.bfloat16), fmt, axis=-1).dequantize()
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "text, told", [("codebook5", "1 to 4"), ("codebook1_qjl", "2 to 4"), ("codebok4", "codebook4")]
)
def test_formats_that_are_none(text, told):
    with pytest.raises(FormatError, match=told):
        parse(text)


@pytest.mark.parametrize(
    "fmt, need", [(Codebook(width=3), 8), (Codebook(width=4), 2), (CodebookQJL(width=4), 8)], ids=str
)
def test_axes_that_do_not_divide(fmt, need):
    with pytest.raises(FormatError, match=f"axis of 65 is not a multiple of {need}"):
        tensor.quantize(jnp.ones((2, 65)), fmt, axis=-1)


def test_the_way_number_by_number(rng):
    """What a pass that chooses codes or scales itself uses: it meets `encode` where the scale is that of the length."""
    fmt, x = Codebook(width=4), jnp.asarray(rng.normal(size=(6, 64)), jnp.float32)
    scale, zero = fmt.grid(x)
    np.testing.assert_array_equal(scale, fmt.encode(x).scale)
    steps = fmt.steps(scale, zero, 64)
    codes = fmt.code(x, *steps)
    values = fmt.decode(fmt.assemble(codes, scale, zero), 64, jnp.float32)
    np.testing.assert_array_equal(values, fmt.value(codes, *steps))
    assert distortion(np.asarray(values), np.asarray(x)) == pytest.approx(DISTORTION[4], rel=0.25)
    np.testing.assert_allclose(fmt.grid(x, 0.5)[0], scale / 2, rtol=1e-3)


# --- QJL -------------------------------------------------------------------------------------------------------------


def attention(seed: int = 0):
    """Queries and keys [T, 128] whose logits have a spread of about 2, as those of trained heads."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(64, 128)), rng.normal(size=(512, 128))
    return (2 * q).astype(np.float32), k.astype(np.float32)


def losses(fmt) -> tuple[float, float, float]:
    """(mean of the logits' error, its root mean square, KL of the softmax) of rotated keys stored in `fmt`."""
    q, k = attention()
    turn = Rotation(d=128, seed=3)
    q, k = np.asarray(turn(jnp.asarray(q))), np.asarray(turn(jnp.asarray(k)))
    exact, got = (np.asarray(q @ keys.T / np.sqrt(128), np.float64) for keys in (k, stored(fmt, k)))
    p, log_p, log_q = jax.nn.softmax(exact), jax.nn.log_softmax(exact), jax.nn.log_softmax(got)
    slope = np.sum((got - exact) * exact) / np.sum(exact**2)
    return float(slope), float(np.sqrt(np.mean((got - exact) ** 2))), float(jnp.mean(jnp.sum(p * (log_p - log_q), -1)))


def test_the_estimate_of_qjl_has_no_bias(rng):
    """Over many S: here over many vectors and queries with one S. Lengths of centroids alone shrink a logit by D."""
    q, k = (rng.normal(size=(size, 128)).astype(np.float32) for size in (64, 2000))
    exact, got = q @ k.T, q @ stored(CodebookQJL(width=2), k).T
    assert abs(np.sum((got - exact) * exact) / np.sum(exact**2)) < 0.01


@pytest.mark.parametrize("width", [2, 3, 4])
def test_why_qjl_is_off(width):
    """At equal bits its variance is (pi / 2) D(b - 1) against D(b), and variance is what a softmax passes on. Measured at 2, 3, 4
    bits: error of a logit 0.69, 0.37, 0.19 and with QJL 1.61, 0.88, 0.47; KL 0.23, 0.063, 0.018 and with QJL 1.25, 0.37, 0.11.
    The bias that it takes away is 6%, 1.5%, 0.5% of a logit."""
    slope, error, kl = losses(Codebook(width=width))
    slope_qjl, error_qjl, kl_qjl = losses(CodebookQJL(width=width))
    assert abs(slope_qjl) < 0.03
    assert error_qjl > 2 * error
    assert kl_qjl > 4 * kl


@widths
def test_grown_by_norm_correction_no_logit_loses_its_order(width):
    """Spread of logits stays that of exact ones within 2 D."""
    slope, _, _ = losses(Codebook(width=width))
    assert -DISTORTION[width] < slope < 0.01


def test_integers_whose_codes_span_less_than_the_range(rng):
    """`clip` of integers: the scale is that share of the plain one, and the name says it."""
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    whole, clipped = (parse(name) for name in ("int2_g32_asym", "int2_g32_asym_clip0.92"))
    assert str(clipped) == "int2_g32_asym_clip0.92" and clipped == dataclasses.replace(whole, clip=0.92)
    np.testing.assert_allclose(clipped.grid(x)[0], 0.92 * np.asarray(whole.grid(x)[0], np.float32), rtol=2e-3)
    with pytest.raises(FormatError, match="clip 1.5"):
        dataclasses.replace(whole, clip=1.5)
    with pytest.raises(FormatError):
        parse("mxfp4_clip0.9")


def test_the_format_is_a_value():
    assert hash(Codebook(width=3)) == hash(dataclasses.replace(Codebook(width=4), width=3))
