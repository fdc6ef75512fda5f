"""A layer of SmolLM2 on text that calibration did not see: what calibrated conversions keep beside those of weights alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import optx
from optx.cache import Ragged, View
from optx.passes.gqa import Gqa, gqa
from optx.passes.linearize import Linearize, linearize
from optx.passes.mla import Mla, mla
from optx.passes.share_kv import ShareKV, share_kv
from optx.registry import SeenBlock, Site

LENGTH = 256
TOKENS = 8 * LENGTH  # of calibration


@functools.cache
def layer(path, text):
    """(the second layer's attention, its inputs and what the first layer caches of them: calibration, then held out)."""
    source = optx.load(path, dtype="float32")
    ids = source.tokenizer.encode(text, add_special=False)[: TOKENS + 2 * LENGTH]
    embed, first, second = (source.block(name) for name in ("embed", "layers/0", "layers/1"))

    def entering(ids):
        ragged = Ragged.dense(len(ids) // LENGTH, LENGTH)
        x, pool = first(embed(jnp.asarray(ids, jnp.int32)), ragged, None)
        return second.norm(x), ragged, pool

    return second.mixer, entering(ids[:TOKENS]), entering(ids[TOKENS:])


def lost(path, text, pass_, options) -> float:
    """|y' - y| / |y| of the layer's output on held out text."""
    attn, (x, ragged, pool), held = layer(path, text)
    site = Site(path="layers/1/mixer", layers=2, seen=SeenBlock(parts={}, inputs=((x, ragged, pool),)))
    new = pass_(site, attn, options)
    x, ragged, pool = held
    want = attn(x, ragged, None)[0]
    view = View(pool=pool, slots=ragged.starts) if new.cache.share is not None else None
    return float(jnp.linalg.norm(new(x, ragged, view)[0] - want) / jnp.linalg.norm(want))


@pytest.fixture
def loses(smollm2_path, wikitext):
    text = wikitext.read_text(encoding="utf-8")[:20_000]
    return lambda pass_, options: lost(smollm2_path, text, pass_, options)


def test_aligned_heads_lose_less_than_means(loses):
    aligned, mean = (loses(gqa, Gqa(kv_heads=1, pool=pool)) for pool in ("aligned", "mean"))
    assert aligned < 0.75 * mean, (aligned, mean)


def test_a_fitted_reader_loses_less(loses):
    fitted, plain = (loses(share_kv, ShareKV(factor=2, align=align)) for align in (True, False))
    assert fitted < 0.75 * plain, (fitted, plain)


@pytest.mark.parametrize("cut", [0.5, 0.69, 0.81])
def test_latents_of_text_lose_less_than_those_of_weights(loses, cut):
    found = {
        least: loses(mla, Mla(kv_cut=cut, rope="pca", rope_dim=32, least=least))
        for least in ("weights", "keys_and_values", "attention")
    }
    assert max(found["attention"], found["keys_and_values"]) < 0.75 * found["weights"], found


def test_full_rank_loses_nothing(loses):
    assert loses(mla, Mla()) < 1e-5
    assert np.isclose(loses(mla, Mla(rope="pca", rope_dim=192)), 0, atol=1e-5)


@pytest.mark.parametrize("to", ["mamba2", "gdn", "lightning"])
def test_a_fitted_recurrence_loses_less(loses, to):
    """Attention says little where it rests on the first token, which weights alone do not show."""
    fitted, plain = (loses(linearize, Linearize(to=to, fit=fit)) for fit in (True, False))
    assert fitted < min(0.9, 0.6 * plain), (fitted, plain)
