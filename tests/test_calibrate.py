"""Calibration text through a model: statistics against plain arithmetic, blocks that see what was compressed before them."""

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest
from test_quality import TEXT, source

import optx
from optx import ir
from optx.cache import Ragged
from optx.calibrate import Feed
from optx.errors import PassError, RecipeError
from optx.nn.moe import Experts, MoE, Router
from optx.passes.gptq import GPTQ
from optx.passes.mla import Mla
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.rotate import Rotate
from optx.recipe import Calibration, Recipe
from optx.registry import Seen, SeenBlock
from optx.watch import watch

ALL = frozenset({"absmax", "absmean", "square", "gram"})


def mixture(seed: int = 0):
    """The tiny llama with four experts in its second layer."""
    model = families.abstract("llama")
    d = families.D
    model.layers[1].mlp = MoE(Router(d, 4, top_k=2), Experts(4, d, 16))
    return ir.init_weights(model, seed)


def inputs(model, windows, path: str) -> list[tuple]:
    """Arguments of the calls of the module at `path`, a window each."""
    found = []
    for tokens in windows:
        copy = ir.shallow(model)
        watch(copy, [path], lambda _, call, *args: found.append(args) or call(*args))
        copy(tokens)
    return found


def expected(x: np.ndarray) -> dict[str, np.ndarray]:
    x = np.asarray(x, np.float64)
    return {
        "absmax": np.abs(x).max(0),
        "absmean": np.abs(x).mean(0),
        "square": (x * x).mean(0),
        "gram": x.T @ x / len(x),
    }


def close(seen: Seen, want: dict, at=()) -> None:
    for name, value in want.items():
        np.testing.assert_allclose(getattr(seen, name)[at], value, rtol=2e-5, atol=1e-6, err_msg=name)


def feed_to(model, windows, layer: int) -> Feed:
    feed = Feed(model, windows)
    for prefix in ("embed", *(f"layers/{i}" for i in range(layer))):
        feed.advance(ir.get(model, prefix), prefix)
    return feed


@pytest.mark.parametrize("path", ["mixer/q", "mixer/o", "mlp/gate", "mlp/down"])
def test_statistics_are_those_of_the_inputs(path):
    model, windows = families.concrete("llama"), calibrated.windows(families.concrete("llama"))
    feed = feed_to(model, windows, 1)
    seen = feed.collect(model.layers[1], "layers/1", [path], ALL)[f"layers/1/{path}"]
    x = np.concatenate([np.asarray(args[0]) for args in inputs(model, windows, f"layers/1/{path}")])
    assert int(seen.tokens) == len(x) == feed.tokens
    close(seen, expected(x))


def test_only_what_is_asked_for_is_taken():
    model = families.concrete("llama")
    feed = feed_to(model, calibrated.windows(model), 0)
    seen = feed.collect(model.layers[0], "layers/0", ["mixer/q"], frozenset({"square"}))["layers/0/mixer/q"]
    assert seen.square is not None and (seen.gram, seen.absmax, seen.absmean) == (None, None, None)


def test_experts_see_their_own_tokens(monkeypatch):
    monkeypatch.setattr("optx.calibrate.SPLIT", 16)  # an expert's tokens are several pieces
    model = mixture()
    windows = calibrated.windows(model)
    feed = feed_to(model, windows, 1)
    for name in ("gate_up", "down"):
        path = f"mlp/experts/{name}"
        seen = feed.collect(model.layers[1], "layers/1", [path], ALL)[f"layers/1/{path}"]
        calls = inputs(model, windows, f"layers/1/{path}")
        x = np.concatenate([np.asarray(args[0]) for args in calls])
        owners = np.concatenate([np.asarray(args[2]) for args in calls])
        assert seen.tokens.tolist() == np.bincount(owners, minlength=4).tolist()
        for expert in range(4):
            if (owners == expert).any():
                close(seen, expected(x[owners == expert]), expert)


def test_a_larger_part_gets_its_projections_and_its_calls():
    model = families.concrete("llama")
    windows = calibrated.windows(model)
    feed = feed_to(model, windows, 0)
    seen = feed.collect(model.layers[0], "layers/0", ["mlp"], frozenset({"square", "inputs"}))["layers/0/mlp"]
    assert isinstance(seen, SeenBlock) and set(seen.parts) == {"gate", "up", "down"}
    (x,) = seen.inputs[0]
    want = np.concatenate([np.asarray(args[0]) for args in inputs(model, windows, "layers/0/mlp")])
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)


def test_blocks_see_what_was_compressed_before_them():
    model, recipe = families.concrete("llama"), Recipe(weights=[QuantizeWeights(format="int2", match="layers/0/.*")])
    windows = calibrated.windows(model)
    out, _ = calibrated.through(model, recipe, windows)
    feed = feed_to(out, windows, 1)
    tokens = jnp.concatenate([jnp.asarray(w).reshape(-1) for w in windows])
    _, _, (want,) = out.backbone(tokens, Ragged.dense(len(windows), windows[0].shape[1]), taps=(1,))
    np.testing.assert_allclose(feed.chunks[0], want, rtol=1e-5, atol=1e-5)
    _, _, (before,) = model.backbone(tokens, Ragged.dense(len(windows), windows[0].shape[1]), taps=(1,))
    assert np.abs(np.asarray(before) - np.asarray(want)).max() > 0.1


def test_a_layer_that_reads_an_earlier_ones_cache():
    model = families.hybrid()
    windows = calibrated.windows(model)
    feed = feed_to(model, windows, len(model.layers))
    tokens = jnp.concatenate([jnp.asarray(w).reshape(-1) for w in windows])
    hidden, _, _ = model.backbone(tokens, Ragged.dense(len(windows), windows[0].shape[1]))
    np.testing.assert_allclose(model.norm(feed.chunks[0]), hidden, rtol=1e-4, atol=1e-5)


def test_measured_or_not_the_weights_are_the_same():
    llama = source(families.concrete("llama", max_position_embeddings=64))
    recipe = Recipe(weights=[GPTQ(format="int4", match="layers/.*")], calibration=Calibration(windows=3, context=48))
    with_figures = optx.compile(llama, recipe, "cpu", calibration=TEXT)
    streamed = optx.compile(llama, recipe, "cpu", calibration=TEXT, measured=False)
    assert with_figures.plan.records[0].quality.kl > 0 and streamed.plan.records[0].quality is None
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(with_figures.logits(tokens), streamed.logits(tokens))


def test_what_runs_before_a_rotation_sees_the_stream_before_it(tmp_path):
    """`mla` is fitted to unrotated inputs in every block, also where blocks come one by one, and `gptq` to rotated ones."""
    llama = source(families.concrete("llama", max_position_embeddings=64))
    text = Calibration(windows=3, context=48)
    mla, gptq = Mla(kv_cut=0.5, rope="pca"), GPTQ(format="int8", match="layers/.*/mlp/.*")
    whole = Recipe(attention=[mla], fold=[Rotate()], weights=[gptq], calibration=text)
    tokens = np.arange(20)[None]
    converted = optx.compile(llama, Recipe(attention=[mla], calibration=text), "cpu", calibration=TEXT, measured=False)
    rotated = optx.compile(llama, whole, "cpu", calibration=TEXT, measured=False, work=tmp_path / "work")
    error = rotated.logits(tokens) - converted.logits(tokens)
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(converted.logits(tokens))


def test_without_text_the_rule_is_named():
    llama = source(families.concrete("llama"))
    with pytest.raises(
        RecipeError, match=r"recipe.weights\[0\]: gptq reads its inputs \(gram\) on calibration text; give"
    ):
        optx.compile(llama, Recipe(weights=[GPTQ(format="int4", match="layers/.*")]), "cpu")


def test_a_site_that_the_text_does_not_reach():
    model = families.hybrid()
    latent = next(
        i for i, layer in enumerate(model.layers) if hasattr(layer.mixer, "kv_b") or "MLA" in type(layer.mixer).__name__
    )
    feed = feed_to(model, calibrated.windows(model), latent)
    inner = next(path for path, part in ir.walk(model.layers[latent]) if type(part).__name__ == "Inner")
    with pytest.raises(PassError, match=f"layers/{latent}/{inner}: calibration text does not reach it"):
        feed.collect(model.layers[latent], f"layers/{latent}", [inner], frozenset({"gram"}))


def test_numbers_that_are_none_are_an_error():
    model = families.concrete("llama")
    broken = ir.shallow(model)
    table = model.embed.table.get_value().at[:, 3].set(jnp.inf)
    broken.embed = ir.replace(model.embed, table=table)
    feed = feed_to(broken, calibrated.windows(model), 0)
    with pytest.raises(PassError, match="layers/0/mixer/q: square of its inputs on calibration text is not finite"):
        feed.collect(model.layers[0], "layers/0", ["mixer/q"], frozenset({"square"}))
