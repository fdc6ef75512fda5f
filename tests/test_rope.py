"""Rotary embeddings: frequencies and factors are those that transformers computes, config fields are read strictly."""

import jax.numpy as jnp
import numpy as np
import pytest

from optx.checkpoint.config import Fields
from optx.errors import ConfigError
from optx.models.common import rope_from_hf, yarn_mscale
from optx.nn import Rope

OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
BARE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 1.25}
# name: (parameters, head, longest, partial, factor, frequencies 0, 1/4, 1/2, 3/4 of the way and the last), transformers 5
YARN = {
    "truncated": (
        OSS, 64, 131072, None, 1.3465735902799727,
        [1.0, 0.05081327259540558, 0.0005809474969282746, 4.099978468730114e-06, 3.023511396804679e-07],
    ),
    "smooth": (
        OSS | {"truncate": False}, 64, 131072, None, 1.3465735902799727,
        [1.0, 0.05081327259540558, 0.0004564839182421565, 4.099978468730114e-06, 3.023511396804679e-07],
    ),
    "mscale": (
        DEEPSEEK, 64, 163840, None, 1.0857263992561355,
        [1.0, 0.10000000149011612, 0.005500000435858965, 2.499999936844688e-05, 3.3338035336782923e-06],
    ),
    "partial": (
        BARE | {"partial_rotary_factor": 0.5}, 32, 1024, 1.0, 1.25,
        [1.0, 0.08125000447034836, 0.0043750000186264515, 0.0002500000118743628, 7.905694656074047e-05],
    ),
}  # fmt: skip


def read(parameters, head, longest, partial=None, *, name="rope_parameters", **other) -> Rope:
    config = Fields({"max_position_embeddings": longest, name: parameters, **other}, "config.json")
    rope = rope_from_hf(config, head, partial=partial)
    config.size("max_position_embeddings")
    config.done()
    return rope


@pytest.mark.parametrize("case", YARN)
def test_yarn_is_that_of_transformers(case):
    parameters, head, longest, partial, factor, frequencies = YARN[case]
    rope = read(parameters, head, longest, partial)
    found = rope.frequencies()
    assert found.dtype == np.float32 and len(found) == rope.dim // 2
    places = [0, len(found) // 4, len(found) // 2, 3 * len(found) // 4, -1]
    np.testing.assert_allclose(found[places], frequencies, rtol=3e-7)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_both_namings_give_one_rope():
    old = {name: value for name, value in DEEPSEEK.items() if name not in ("rope_type", "rope_theta")} | {
        "type": "yarn"
    }
    assert read(old, 64, 163840, name="rope_scaling", rope_theta=10000.0) == read(DEEPSEEK, 64, 163840)
    inside = read({"rope_theta": 1e4, "partial_rotary_factor": 0.25}, 32, 64, 1.0)
    assert inside == read({"rope_theta": 1e4}, 32, 64, 1.0, partial_rotary_factor=0.25) == Rope(theta=1e4, dim=8)


def test_only_the_first_numbers_turn_and_the_factor_is_theirs(rng):
    x = jnp.asarray(rng.normal(size=(3, 2, 16)), jnp.float32)
    positions = jnp.asarray([0, 5, 90])
    plain = Rope(theta=1e4, dim=8, scaling="yarn", factor=4.0, original=32)
    grown = Rope(theta=1e4, dim=8, scaling="yarn", factor=4.0, original=32, attention_factor=1.5)
    np.testing.assert_array_equal(grown(x, positions)[..., 8:], x[..., 8:])
    np.testing.assert_allclose(grown(x, positions)[..., :8], 1.5 * plain(x, positions)[..., :8], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain(x, positions)[0], x[0])


@pytest.mark.parametrize(
    ("parameters", "partial", "message"),
    [
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, None, "'partial_rotary_factor' is 0.5; supported: 1.0 or absent"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 1.5}, 1.0, "'partial_rotary_factor' is 1.5; allowed: above 0, up to 1"),
        (BARE | {"rope_theta": 1.0}, None, "rotary embedding with yarn and theta 1; allowed: above 1"),
        (BARE | {"slope": 2}, None, "slope=2"),
        (BARE | {"factor": 0}, None, "'factor' is 0.0; allowed: above 0"),
    ],
)  # fmt: skip
def test_what_is_refused(parameters, partial, message):
    with pytest.raises(ConfigError, match=message):
        read(parameters, 32, 64, partial)


def test_yarn_mscale():
    assert (yarn_mscale(1.0), yarn_mscale(0.5, 2.0)) == (1.0, 1.0)
    assert yarn_mscale(40.0, 0.5) == pytest.approx(1 + 0.05 * np.log(40))
