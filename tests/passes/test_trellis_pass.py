"""trellis: two bits a weight, a smaller output error than weights rounded alone, and errors that name the site."""

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest

from optx import ir, pipeline, tensor
from optx.errors import LegalityError, PassError
from optx.formats import Int, Trellis
from optx.legality import Guard
from optx.nn import Linear
from optx.passes.quantize_weights import QuantizeWeights, quantize_weights
from optx.passes.trellis import TrellisOptions, trellis
from optx.recipe import Recipe
from optx.registry import Seen, Site

SITE = "layers/0/mlp/up"
OPTIONS = TrellisOptions(memory=8)


def linear(weight) -> Linear:
    return ir.replace(Linear(*weight.shape), weight=weight)


@pytest.fixture(scope="module")
def layer() -> tuple[Linear, np.ndarray, Site]:
    """A projection, the inputs that calibration saw (few directions, one channel of large numbers), and its site."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 16)) @ rng.standard_normal((16, 128)) + 0.3 * rng.standard_normal((512, 128))
    x[:, 7] *= 8
    seen = Seen(tokens=jnp.int32(512), gram=jnp.asarray(x.T @ x / 512, jnp.float32))
    return (
        linear(jnp.asarray(rng.standard_normal((128, 32)) * 0.02, jnp.float32)),
        x,
        Site(path=SITE, layers=1, seen=seen),
    )


def output_error(before: Linear, after: Linear, x) -> float:
    w, new = (np.asarray(tensor.dense(part.weight.get_value())) for part in (before, after))
    return float(np.linalg.norm(x @ (new - w)) / np.linalg.norm(x @ w))


def test_the_output_error_is_below_that_of_3_bits_rounded_and_of_the_trellis_without_inputs(layer):
    part, x, site = layer
    fitted = trellis(site, part, OPTIONS)
    alone = linear(tensor.quantize(part.weight.get_value(), OPTIONS.storage()))
    rounded = quantize_weights(site, part, QuantizeWeights(format="int3", group=64))
    errors = [output_error(part, each, x) for each in (fitted, alone, rounded)]
    assert errors[0] < 0.8 * errors[1] and errors[0] < errors[2], errors
    assert fitted.weight.get_value().bits_per_weight == 2 + 16 / 128


def test_a_model_is_rewritten_as_planned():
    """The concrete blocks have the form of the plan, or `apply_block` raises."""
    recipe = Recipe(weights=[TrellisOptions(match="layers/.*/(q|down)", memory=8)])
    out, (record,) = calibrated.through(families.concrete("llama", num_hidden_layers=1), recipe)
    assert record.sites == 2 and all(0.1 < error < 0.5 for error in record.errors.values()), record.errors
    assert out.layers[0].mlp.down.weight.get_value().format == Trellis(memory=8)
    assert not tensor.is_packed(out.layers[0].mlp.up.weight.get_value())


def test_bad_input_names_the_site(layer):
    part, _, site = layer
    with pytest.raises(PassError, match=f"trellis at {SITE}: no statistics of its inputs; compile with calibration"):
        trellis(Site(path=SITE, layers=1), part, OPTIONS)
    broken = linear(part.weight.get_value().at[3, 3].set(jnp.nan))
    with pytest.raises(PassError, match=f"trellis at {SITE}: the weight holds NaN or infinities"):
        trellis(site, broken, OPTIONS)
    packed = linear(tensor.quantize(part.weight.get_value(), Int(width=8)))
    with pytest.raises(PassError, match="the weight is packed already"):
        trellis(site, packed, OPTIONS)
    nan = Seen(tokens=jnp.int32(9), gram=jnp.full((128, 128), jnp.nan))
    with pytest.raises(PassError, match="the Gram matrix of 9 tokens, with damp 0.01 on its diagonal, has no Cholesky"):
        trellis(Site(path=SITE, layers=1, seen=nan), part, OPTIONS)


def test_twice_is_refused():
    recipe = Recipe(weights=[TrellisOptions(memory=8), QuantizeWeights(format="int4")])
    with pytest.raises(LegalityError, match="packed_twice"):
        pipeline.run(families.abstract("llama", num_hidden_layers=1), recipe, [Guard(recipe)])
