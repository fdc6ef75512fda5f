"""Rotations: orthogonal, the fast transform equal to the matrix, both ways, on any axis."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import block_diag, hadamard

from optx.hadamard import Rotation, block, matrix

WIDTHS = [1, 2, 8, 64, 256, 1024, 576, 640, 1536, 7, 12, 96]


def written_out(rotation: Rotation) -> np.ndarray:
    """float64[D, D], from what the transform does to unit vectors."""
    return rotation.fold(np.eye(rotation.d), -1)


@pytest.mark.parametrize("n", [1, 2, 4, 64, 512])
def test_the_matrix_is_sylvesters(n):
    np.testing.assert_allclose(matrix(n) * np.sqrt(n), hadamard(n), atol=1e-12)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("seed, mixed", [(None, False), (3, False), (3, True)])
def test_orthogonal(d, seed, mixed):
    q = written_out(Rotation(d=d, seed=seed, mixed=mixed))
    np.testing.assert_allclose(q @ q.T, np.eye(d), atol=1e-12)


@pytest.mark.parametrize("d", WIDTHS)
def test_plain_is_block_diagonal_hadamard(d):
    n = block(d)
    want = block_diag(*[hadamard(n) / np.sqrt(n)] * (d // n))
    np.testing.assert_allclose(written_out(Rotation(d=d)), want, atol=1e-12)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("seed, mixed", [(None, False), (5, True)])
def test_the_fast_transform_equals_the_matrix(d, seed, mixed):
    rotation = Rotation(d=d, seed=seed, mixed=mixed)
    x = np.random.default_rng(0).standard_normal((3, 2, d)).astype(np.float32)
    q = written_out(rotation)
    np.testing.assert_allclose(rotation(jnp.asarray(x)), x @ q, atol=2e-6 * np.sqrt(d))
    np.testing.assert_allclose(rotation.back(jnp.asarray(x)), x @ q.T, atol=2e-6 * np.sqrt(d))
    np.testing.assert_allclose(rotation.back(rotation(jnp.asarray(x))), x, atol=2e-6 * np.sqrt(d))


@pytest.mark.parametrize("d", [8, 576, 12])
def test_folding_along_each_axis(d):
    rotation = Rotation(d=d, seed=1, mixed=True)
    w, q = np.random.default_rng(1).standard_normal((2, d, 5)), written_out(rotation)
    np.testing.assert_allclose(rotation.fold(w, -2), q.T @ w, atol=1e-12)
    np.testing.assert_allclose(rotation.fold(w.swapaxes(1, 2), -1), w.swapaxes(1, 2) @ q, atol=1e-12)
    np.testing.assert_allclose(rotation.unfold(rotation.fold(w, -2), -2), w, atol=1e-12)


def test_smaller_blocks():
    want = block_diag(*[hadamard(16) / 4] * 4)
    np.testing.assert_allclose(written_out(Rotation(d=64, size=16)), want, atol=1e-12)


def test_signs_follow_from_seed_and_width():
    same, other = (written_out(Rotation(d=64, seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(written_out(Rotation(d=64, seed=0)), same)
    assert np.abs(same - other).max() > 0.1


def test_an_outlier_is_spread():
    x = np.zeros(512)
    x[7] = 100
    for rotation in (Rotation(d=512), Rotation(d=512, seed=0)):
        assert np.abs(rotation.fold(x, -1)).max() == pytest.approx(100 / np.sqrt(512))


def test_half_precision_stays():
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert Rotation(d=64)(x).dtype == jnp.bfloat16
