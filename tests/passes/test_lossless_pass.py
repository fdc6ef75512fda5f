"""lossless: the same model bit for bit in fewer bytes, and an error where that cannot be."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import ir, tensor
from optx.errors import PassError
from optx.formats import Int, Lossless
from optx.nn import Embed, Linear
from optx.passes.lossless import LosslessOptions, lossless
from optx.recipe import Recipe
from optx.registry import Site, Skipped

SITE = Site(path="layers/0/mlp/up", layers=1)
RECIPE = Recipe(name="lossless", weights=[LosslessOptions()])


def linear(weight) -> Linear:
    return ir.replace(Linear(*weight.shape), weight=weight)


def special() -> jax.Array:
    bits = np.array([0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC0, 0x3F80], np.uint16)
    return jax.lax.bitcast_convert_type(jnp.asarray(np.tile(bits, (8, 4)).T), jnp.bfloat16)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_are_equal_bit_for_bit(family):
    model, tokens = families.concrete(family, dtype="bfloat16", num_hidden_layers=1), families.prompt(12)
    compiled, plain = optx.compile(model, RECIPE), optx.compile(model)
    np.testing.assert_array_equal(compiled.logits([tokens])[0], plain.logits([tokens])[0])
    assert isinstance(compiled.tree.embed.table.get_value().format, Lossless)
    assert compiled.plan.records[0].exact and set(compiled.plan.records[0].errors.values()) <= {0.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_special_numbers_come_back(dtype):
    weight = special().astype(dtype)
    out = lossless(SITE, linear(weight), LosslessOptions()).weight.get_value()
    kind = np.uint16 if dtype == "bfloat16" else np.uint32
    np.testing.assert_array_equal(*(np.asarray(x).view(kind) for x in (out.dequantize(), weight)))


def test_float32_weights_that_are_no_bf16_are_an_error():
    weight = jnp.full((32, 8), 0.5).at[0, 0].set(0.1)
    with pytest.raises(PassError, match=r"layers/0/mlp/up: 0.39% of the weights are no bf16 numbers; load with dtype"):
        lossless(SITE, linear(weight), LosslessOptions())


def test_what_does_not_fit_its_room_is_an_error_that_says_how_much_would():
    bits = np.random.default_rng(0).integers(0, 0x7F80, (64, 8)).astype(np.uint16)
    part = linear(jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16))
    with pytest.raises(PassError, match=r"a row of 64 need \d+ bytes .*; set spare: \d+") as error:
        lossless(SITE, part, LosslessOptions())
    spare = int(str(error.value).partition("set spare: ")[2].partition(",")[0])
    out = lossless(SITE, part, LosslessOptions(spare=spare)).weight.get_value()
    np.testing.assert_array_equal(np.asarray(out.dequantize()).view(np.uint16), bits)


def test_packed_weights_stay():
    packed = tensor.quantize(jnp.ones((32, 8)), Int(width=8))
    found = lossless(SITE, linear(packed), LosslessOptions())
    assert isinstance(found, Skipped) and "packed already, int8" in found.reason


def test_shapes_are_known_before_the_weights():
    part = Embed(16, 32, dtype="bfloat16")
    planned = lossless(SITE, part, LosslessOptions()).table.get_value()
    made = lossless(SITE, ir.replace(part, table=jnp.ones((16, 32), jnp.bfloat16)), LosslessOptions()).table.get_value()
    assert planned.data.shape == made.data.shape and planned.axis == made.axis == -1
