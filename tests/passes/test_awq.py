"""awq: less error than plain rounding where channels stand out, for the reasons that it gives."""

import dataclasses
from pathlib import Path

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx import formats, ir, pipeline, tensor
from optx.checkpoint.source import from_module
from optx.errors import LegalityError, PassError, RecipeError
from optx.formats.search import clipped_grid
from optx.nn.core import Linear
from optx.nn.moe import GroupedLinear
from optx.passes.awq import AWQ
from optx.passes.clsa import Clsa
from optx.passes.gptq import GPTQ
from optx.passes.moba import Moba
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.rotate_online import RotateOnline
from optx.passes.share_kv import ShareKV
from optx.recipe import Recipe

GOLDENS = Path(__file__).parent.parent / "goldens"


def recipe(format="int3", group=8, **options) -> Recipe:
    return Recipe(weights=(AWQ(format=format, group=group, match="layers/.*", **options),))


def plain(format="int3", group=8) -> Recipe:
    return Recipe(weights=(QuantizeWeights(format=format, group=group, match="layers/.*"),))


def outliers():
    """A layer in which two channels of every norm are 20 times as large as the others."""
    tree = families.concrete("llama", num_hidden_layers=1)
    block = tree.layers[0]
    for name in ("norm", "mlp_norm"):
        norm = getattr(block, name)
        ir.put(block, name, ir.replace(norm, weight=norm.weight.get_value().at[jnp.array([3, 17])].mul(20)))
    return tree


def test_better_than_rounding_where_channels_stand_out():
    tree, tokens = outliers(), jnp.asarray([families.prompt(48)], jnp.int32)
    rules = {"rounded": plain(), "scaled": recipe(clip=False), "both": recipe()}
    found = {name: families.relative(calibrated.through(tree, r)[0](tokens), tree(tokens)) for name, r in rules.items()}
    assert found["scaled"] < 0.8 * found["rounded"] and found["both"] < 0.7 * found["rounded"], found


def test_every_projection_is_rounded_and_scales_lie_in_what_comes_before():
    tree = outliers()
    out, (record,) = calibrated.through(tree, recipe("int8", None))
    for path, part in ir.walk(out.layers[0]):
        if isinstance(part, Linear | GroupedLinear):
            assert tensor.is_qtensor(part.weight.get_value()), path
    tokens = jnp.asarray([families.prompt(20)], jnp.int32)
    assert families.relative(out(tokens), tree(tokens)) < 0.02  # scales cancel: 8 bits are near what there was
    assert not record.exact and record.sites == 1


def test_experts_are_scaled_and_rounded():
    """Experts share the norm's scale with the router and have their own inside."""
    tree = optx.load(str(GOLDENS / "mixtral"), dtype="float32").load()
    tree = ir.replace(tree, layers=type(tree.layers)(list(tree.layers)[:1]))
    tokens = jnp.asarray(calibrated.windows(tree, count=1)[0])
    out, _ = calibrated.through(tree, recipe("int8", None))
    before, after = tree.layers[0].mlp, out.layers[0].mlp
    assert families.relative(out(tokens), tree(tokens)) < 0.03
    assert families.relative(after.router.weight.get_value(), before.router.weight.get_value()) > 1e-3
    ratio = np.asarray(after.experts.down.weight.get_value().dequantize() / before.experts.down.weight.get_value())
    assert ratio.std() > 1e-2


def test_clipping_is_the_best_of_the_ranges_tried():
    """By brute force over the ranges of one group: e^T G e on the inputs' Gram matrix."""
    rng, format_ = np.random.default_rng(0), formats.Int(width=3, group=16)
    w, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 32), (200, 32)))
    x = x * jnp.asarray(np.exp(rng.normal(size=32)), jnp.float32)
    scale, _ = clipped_grid(format_, w, x.T @ x)

    def error(shrink):
        grid = format_.grid(w, shrink)
        steps = format_.steps(*grid, 32)
        off = (w - format_.value(format_.code(w, *steps), *steps)).reshape(4, 2, 16)
        return np.einsum("tgi,fgi->tfg", np.asarray(x).reshape(-1, 2, 16), off).__pow__(2).sum(0), grid[0]

    tried = [error(1 - 0.05 * i) for i in range(11)]
    best = np.argmin([cost for cost, _ in tried], axis=0)
    want = np.take_along_axis(np.stack([np.asarray(s) for _, s in tried]), best[None], axis=0)[0]
    np.testing.assert_array_equal(scale, want)
    assert best.max() > 0


def test_refused_places_and_parts_that_text_does_not_reach_are_noted():
    tree = families.concrete("qwen3", num_hidden_layers=1)
    _, (record,) = calibrated.through(tree, recipe("int4", points=2))
    assert "norm: heads of q and k are normed" in record.notes["layers/0"]


def test_bad_input():
    tree = families.concrete("llama", num_hidden_layers=1)
    with pytest.raises(RecipeError, match="awq reads its inputs .absmean, gram, inputs. on calibration text"):
        optx.compile(from_module(tree), recipe())
    with pytest.raises(LegalityError, match="layers/0/mixer/q.*int3_g24: axis of 32 is not a multiple"):
        optx.plan(from_module(tree), recipe(group=24))
    with pytest.raises(PassError, match="awq at layers/0: 1 points on 2048 tokens; allowed: at least 2"):
        pipeline.run(ir.abstract(tree), recipe(points=1))
    with pytest.raises(RecipeError, match="sites .N an index.: layers/N"):
        pipeline.run(ir.abstract(tree), Recipe(weights=(AWQ(format="int4", match="layers/.*/q"),)))
    twice = Recipe(weights=(*recipe().weights, GPTQ(format="int4", group=8, match="layers/.*")))
    with pytest.raises(LegalityError, match="gptq at layers/0/.* packed already"):
        optx.plan(from_module(tree), twice)
    broken = ir.shallow(tree)
    up = tree.layers[0].mlp.up
    ir.put(broken, "layers/0/mlp/up", ir.replace(up, weight=up.weight.get_value().at[3, 5].set(jnp.nan)))
    with pytest.raises(PassError, match="layers/0/.*(NaN|not finite)"):
        calibrated.through(broken, recipe())


def test_what_runs_rotated_takes_no_scale():
    """A rotation mixes channels, so that a scale a channel does not pass it; the rest of the block is scaled as ever."""
    turned = dataclasses.replace(recipe(), fold=(RotateOnline(keys=False, down=True),))
    tree = outliers()
    out, records = calibrated.through(tree, turned)
    assert any("mlp/down: a rotation stands before it" in note for record in records for note in record.notes.values())
    tokens = jnp.asarray([families.prompt(48)], jnp.int32)
    rounded = calibrated.through(tree, plain())[0]
    assert families.relative(out(tokens), tree(tokens)) < 0.8 * families.relative(rounded(tokens), tree(tokens))


@pytest.mark.parametrize(
    "before",
    [{"structure": [ShareKV(factor=2)]}, {"attention": [Moba(block=4, top_k=3), Clsa()]}],
    ids=["share_kv", "clsa"],
)
def test_layers_that_read_what_an_earlier_one_has_left(before):
    """Keys and values, or a choice of blocks: the scales of such a layer are searched with what it reads."""
    model = families.concrete("llama")
    plain, _ = calibrated.through(model, Recipe(**before))
    tree, _ = calibrated.through(model, Recipe(**before, weights=[AWQ(format="int8", values=False)]))
    assert tensor.is_packed(ir.get(tree, "layers/1/mixer/q").weight.get_value())
    tokens = families.prompt(20)
    assert 0 < families.relative(families.forward(tree, tokens), families.forward(plain, tokens)) < 0.05
