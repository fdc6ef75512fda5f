"""oscar: covariances against plain arithmetic, rotations that change no logits, two bits that lose less than plain integers."""

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest
from test_turboquant import NAMES, exact, shapes, wide

import optx
from optx import ir
from optx.errors import LegalityError, PassError, RecipeError
from optx.formats import Int
from optx.hadamard import Rotation
from optx.nn import Attention
from optx.nn.rotated import CalibratedHeads
from optx.passes.oscar import Oscar, _power, balanced, bit_reversed, covariances, interleaved, rotation
from optx.passes.split_key_bias import SplitKeyBias
from optx.recipe import Calibration, Recipe
from optx.registry import SeenBlock, Site

SMALL = {"bits": 4, "first": 2, "recent": 2}


def through(model, text=None, *fold, **options):
    recipe = Recipe(fold=[*fold, Oscar(**SMALL | options)], allow=["gqa_kivi2"])
    return calibrated.through(model, recipe, calibrated.windows(model, 10, 34) if text is None else text)[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("balanced", [False, True])
def test_rotations_are_exact(family, balanced):
    """Families of every kind of head: plain, normed, windowed with norms, with sinks, with gates (values stay as they are)."""
    assert family in NAMES
    model = ir.init_weights(shapes(family), seed=1)
    tokens = np.random.default_rng(0).integers(0, model.embed.table.get_value().shape[0], 20)
    fold = [SplitKeyBias()] if family in ("llama", "gpt_oss") else []
    tree = through(model, None, *fold, recent=0, balanced=balanced)
    heads = [layer.mixer for layer in tree.layers if isinstance(layer.mixer, Attention)]
    assert any(isinstance(mixer.rope, CalibratedHeads) for mixer in heads)
    assert families.relative(families.forward(plain(tree), tokens), families.forward(model, tokens)) < 1e-4


def plain(tree):
    """Caches as they were, the exact tokens of the pass too."""
    out = ir.shallow(tree)
    for layer in out.layers:
        if isinstance(layer.mixer, Attention):
            layer.mixer.cache = layer.mixer.cache.replace(first=0, recent=0)
    return exact(out)


@pytest.mark.parametrize("context", [None, 50, 1000])
def test_covariances_are_those_of_the_equations(context):
    """Grouped queries, two windows, tokens behind the first 3, the second window moved to the end of 1,000; float64 by hand."""
    model = families.concrete("llama")
    attn, rng = model.layers[0].mixer, np.random.default_rng(1)
    x = rng.normal(size=(2, 80, 32)).astype(np.float32)
    positions = np.tile(np.arange(80, dtype=np.int32), 2)
    ragged = type("Ragged", (), {"positions": jnp.asarray(positions)})
    site = Site(
        path="here", layers=2, seen=SeenBlock(parts={}, inputs=((jnp.asarray(x.reshape(160, 32)), ragged, None),))
    )
    got_q, got_v, got_k = covariances(site, attn, first=3, context=context)
    at = positions + (920 if context == 1000 else 0) * (np.arange(160) >= 80)
    q, k, v = (np.asarray(part, np.float64) for part in attn.turned(jnp.asarray(x.reshape(160, 32)), jnp.asarray(at)))
    keep = positions >= 3
    q, k, v = q[keep], k[keep], v[keep]
    want_v = np.zeros((8, 8))
    for head in range(2):
        mine = q[:, 2 * head : 2 * head + 2].reshape(-1, 8)
        gram = mine.T @ mine / len(mine)
        w = np.sum(k[:, head] @ gram * k[:, head], axis=1)
        np.testing.assert_allclose(got_q[head], gram, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got_k[head], k[:, head].T @ k[:, head] / len(k), rtol=1e-4, atol=1e-5)
        want_v += (v[:, head] * w[:, None]).T @ v[:, head] / w.sum() / 2
    np.testing.assert_allclose(got_v, want_v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [8, 24])
def test_the_rotation(d, rng):
    """Orthogonal; U H up to the order of columns; every column has the mean variance where H mixes all of them."""
    a = rng.normal(size=(d, d)) * np.exp(rng.normal(size=d))
    covariance = a.T @ a
    r = rotation(covariance)
    np.testing.assert_allclose(r.T @ r, np.eye(d), atol=1e-12)
    _, vectors = np.linalg.eigh(covariance)
    want = vectors @ Rotation(d=d).fold(np.eye(d), -1)
    np.testing.assert_allclose(np.sort(r[0]), np.sort(want[0]), atol=1e-12)
    if d == 8:
        np.testing.assert_allclose(np.diag(r.T @ covariance @ r), np.trace(covariance) / d)


@pytest.mark.parametrize("group", [8, 4])
def test_balance(group, rng):
    """Logits keep, and what errors of codes cost them is within a tenth of the least that a transform leaves (the damping
    takes the rest), and less than rotations leave."""
    (kept, queries) = (a.T @ a for a in rng.normal(size=(2, 8, 8)) * np.exp(2 * rng.normal(size=(2, 1, 8))))
    a, b = balanced(kept, queries, group)
    np.testing.assert_allclose(a.T @ b, np.eye(8), atol=1e-8)
    cost = lambda a, b: np.trace(a.T @ kept @ a) * np.trace(b.T @ queries @ b)  # noqa: E731
    root = lambda m: _power(m, 0.5)  # noqa: E731
    least = np.trace(root(root(kept) @ queries @ root(kept))) ** 2
    assert least * (1 - 1e-9) <= cost(a, b) < 1.1 * least < 0.9 * cost(np.eye(8), np.eye(8))


def test_columns_are_dealt_out():
    columns = interleaved(np.arange(8.0), np.eye(8), 4)
    assert [sorted(np.flatnonzero(np.abs(columns[:, i]) > 0)) for i in (0, 4)] == [[1, 3, 5, 7], [0, 2, 4, 6]]


def test_bits_read_backwards():
    assert bit_reversed(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sorted(bit_reversed(24)) == list(range(24))


def test_before_expected():
    model = families.abstract("llama")
    planned = optx.plan(model, Recipe(fold=[Oscar(group=4)], allow=["gqa_kivi2"]))
    lines = [line.strip() for line in ir.describe(planned.tree).splitlines() if "mixer" in line or "rope:" in line]
    assert lines == [
        "mixer: Attention heads=4 kv_heads=2 head_dim=8 scale=0.353553 "
        "cache=(paged k int2_g4_asym_clip0.96, v int2_g4_asym_clip0.92 recent 256 first 64)",
        "rope: CalibratedHeads matrix=f32[8, 8] rope=(rope 10000/8)",
    ]
    planned = optx.plan(model, Recipe(fold=[Oscar(group=4, least=True, balanced=True)], allow=["gqa_kivi2"]))
    lines = [line.strip() for line in ir.describe(planned.tree).splitlines() if "mixer" in line or "rope:" in line]
    assert lines[0].endswith("k int2_g4_affine_clip0.96, v int2_g4_affine_clip0.92 recent 256 first 64)")
    assert "matrix=f32[2, 8, 8] key_matrix=f32[2, 8, 8]" in lines[1]


def test_decoding_sees_what_the_whole_forward_sees():
    model, tokens = families.concrete("llama"), families.prompt(13)
    tree = through(model)
    whole = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, sizes=(7, 1)), whole) < 1e-4
    assert families.relative(whole, families.forward(model, tokens)) > 1e-3


def test_outlier_channels_cost_less_than_with_integers_of_as_many_bits():
    """Head size 128, first 4 tokens exact in both, relative error of the logits: 0.507 at 3 bits, below 0.7 of what integers with
    zero points leave. At 2 bits nothing is left of so small a random layer: 0.838 against 0.867."""
    model, tokens = wide(), families.prompt(48)
    want, text = families.forward(model, tokens), calibrated.windows(model, 18, 128)
    own = through(model, text, bits=3, first=4, recent=0)
    spec = model.layers[0].mixer.cache.replace(format=Int(width=3, symmetric=False), first=4)
    ints = ir.shallow(model)
    ints.layers[0].mixer = ir.replace(ints.layers[0].mixer, cache=spec)
    errors = [families.relative(families.forward(tree, tokens), want) for tree in (own, ints)]
    assert errors[0] < 0.7 * errors[1]


def test_too_few_tokens_are_refused():
    model = families.concrete("llama")
    with pytest.raises(
        PassError, match="oscar at layers/0/mixer: 120 tokens .* behind the first 2 .* at least 128 are needed"
    ):
        through(model, calibrated.windows(model, 4, 32))


def test_numbers_that_are_none():
    model = families.concrete("llama")
    k = model.layers[1].mixer.k.weight
    k.set_value(k.get_value().at[0, 0].set(jnp.nan))
    with pytest.raises(PassError, match="layers/1/mixer: NaN or Inf"):
        through(model)


def test_shared_caches_are_refused():
    model = families.abstract("llama")
    mixer = model.layers[1].mixer
    ir.put(model, "layers/1/mixer", ir.replace(mixer, k=None, v=None, cache=mixer.cache.replace(share=0)))
    with pytest.raises(LegalityError, match="keys_rotated_apart"):
        optx.plan(model, Recipe(fold=[Oscar(**SMALL)]))


@pytest.mark.parametrize("clip", [0, 1.5])
def test_clips_that_are_none(clip):
    with pytest.raises(PassError, match="clip .*; allowed: above 0, at most 1"):
        optx.plan(families.abstract("llama"), Recipe(fold=[Oscar(key_clip=clip)]))


def test_an_export_gives_the_same_logits(tmp_path):
    """The matrix is a parameter: it is written, and read into the tree that the recipe makes of shapes."""
    source = optx.load(str(families.hf_dir(tmp_path / "model", "llama", add_bos=True)[0]))
    recipe = Recipe(fold=[Oscar(**SMALL)], calibration=Calibration(windows=6, context=40))
    with pytest.raises(RecipeError, match="oscar reads its inputs"):
        optx.compile(source, recipe)
    compiled = optx.compile(source, recipe, calibration="The quick brown fox jumps. " * 50, measured=False)
    again = optx.load(str(compiled.export(tmp_path / "export")))
    tokens = np.asarray([families.prompt(9)])
    np.testing.assert_array_equal(optx.compile(again).logits(tokens), compiled.logits(tokens))
