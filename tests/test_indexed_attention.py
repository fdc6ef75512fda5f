"""Attention over the tokens that an index picks: the op and the layer against their equations, and where it is dense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, ir, tensor
from optx.cache import Layout, Ragged, View
from optx.nn import MLA, Indexer, Rope
from optx.pallas.attention import reference as dense
from optx.pallas.attention.reference import Mask
from optx.pallas.indexed_attention import reference

D, HEADS, RANK, P = 16, 3, 8, 4
ROPE = Rope(theta=100.0, dim=4)


def layer(top_k, heads=8):
    indexer = Indexer(D, heads=heads, head_dim=6, top_k=top_k, q_rank=8, rope=ROPE)
    turned = dataclasses.replace(ROPE, interleaved=True)
    sizes = {"heads": HEADS, "rank": RANK, "nope_dim": 4, "value_dim": 6, "q_rank": 8}
    return ir.init_weights(MLA(D, **sizes, rope=turned, indexer=indexer))


def pools(rng, counts, queries):
    """Pages in random order, NaN where nothing is stored -> (arguments of the op, of `paged_attention`)."""
    b, each = len(counts), 4
    pages = b * each
    table = rng.permutation(pages).reshape(b, each)
    latents = np.full((pages + 1, 1, P, RANK + 4), np.nan, np.float32)
    keys, positions = np.full((pages + 1, 1, P, 6), np.nan, np.float32), np.zeros((pages + 1, P), np.int32)
    for row, count in enumerate(counts):
        for t in range(count):
            latents[table[row, t // P], 0, t % P] = rng.normal(size=RANK + 4)
            keys[table[row, t // P], 0, t % P] = rng.normal(size=6)
            positions[table[row, t // P], t % P] = t
    asked = np.stack([np.arange(count - queries, count) for count in counts])
    where = {
        "positions": positions,
        "table": table[None].astype(np.int32),
        "lengths": np.asarray([counts], np.int32),
        "q_positions": np.where(asked < 0, -1, asked).astype(np.int32),
    }
    q = rng.normal(size=(b, queries, HEADS, RANK + 4)).astype(np.float32)
    index = rng.normal(size=(b, queries, 8, 6)).astype(np.float32), rng.normal(size=(b, queries, 8)).astype(np.float32)
    return jax.tree.map(jnp.asarray, ((q, latents, *index, keys), where))


def literal(args, where, top_k, mask, scale):
    """Token by token in float64: score all that is seen, keep the best, softmax over them."""
    q, latents, index_q, weights, keys = (np.asarray(x, np.float64) for x in args)
    table, positions = np.asarray(where["table"])[0], np.asarray(where["positions"])
    out = np.zeros((*q.shape[:3], RANK))
    for row, count in enumerate(np.asarray(where["lengths"])[0]):
        slots = [(table[row, t // P], t % P) for t in range(count)]
        for i, at in enumerate(np.asarray(where["q_positions"])[row]):
            if at < 0:
                continue
            seen = [s for s in slots if positions[s] <= at and (mask.window is None or positions[s] > at - mask.window)]
            score = [np.maximum(index_q[row, i] @ keys[s[0], 0, s[1]], 0) @ weights[row, i] for s in seen]
            best = np.stack([latents[seen[j][0], 0, seen[j][1]] for j in np.argsort(score)[::-1][:top_k]])
            share = np.exp(q[row, i] @ best.T * scale)
            out[row, i] = share / share.sum(-1, keepdims=True) @ best[:, :RANK]
    return out


@pytest.mark.parametrize(
    "top_k, queries, window", [(3, 1, None), (5, 4, None), (5, 4, 8), (16, 4, None), (40, 2, None)]
)
def test_the_op_equals_its_equations(top_k, queries, window, rng):
    args, where = pools(rng, [16, 9, 3], queries)
    kwargs = {"top_k": top_k, "mask": Mask(window=window), "scale": 0.4}
    found = jax.jit(lambda args, where: reference.indexed_attention(*args, value_dim=RANK, **kwargs, **where))(
        args, where
    )
    np.testing.assert_allclose(found, literal(args, where, **kwargs), atol=1e-5)


def test_all_tokens_are_dense_attention(rng):
    args, where = pools(rng, [16, 9, 3], 4)
    found = reference.indexed_attention(*args, top_k=16, value_dim=RANK, scale=0.4, **where)
    want, _, _ = dense.paged_attention(*args[:2], None, value_dim=RANK, scale=0.4, **where)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_blocks_of_queries(rng, monkeypatch):
    args, where = pools(rng, [16, 9, 3], 4)
    run = lambda: reference.indexed_attention(*args, top_k=5, value_dim=RANK, scale=0.4, **where)  # noqa: E731
    want = run()
    monkeypatch.setattr(reference, "GATHERED", 45)  # three queries of three rows, then one
    np.testing.assert_allclose(run(), want, atol=1e-6)


def test_packed_pools(rng):
    """Latents and index keys stored in 8 bits: what is chosen and read is what they decode to."""
    args, where = pools(rng, [16, 16], 2)
    packed = [tensor.quantize(args[i], formats.parse("int8"), axis=-1) for i in (1, 4)]
    plain = [x.dequantize() for x in packed]
    kwargs = {"top_k": 5, "value_dim": RANK, "scale": 0.4, **where}
    found, want = (reference.indexed_attention(args[0], k, *args[2:4], keys, **kwargs) for k, keys in (packed, plain))
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_the_layer_picks_by_its_index(rng):
    """I_ts = sum_n w_tn relu(q_tn k_s) with halves turned, in a float64 transcription; then MLA over what is picked."""
    part, length, top_k = layer(5), 14, 5
    x = rng.normal(size=(length, D)).astype(np.float32)
    w = {path: np.asarray(v.get_value(), np.float64) for path, v in ir.params(part).items()}
    rms = lambda x, weight: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight  # noqa: E731

    def turn(x, interleaved):
        angle = np.arange(length)[:, None] * 100.0 ** (-np.arange(2) / 2)
        a, b = (x[..., :4:2], x[..., 1:4:2]) if interleaved else (x[..., :2], x[..., 2:4])
        turned = (a + 1j * b) * np.exp(1j * angle)[:, None]
        pairs = np.stack([turned.real, turned.imag], axis=-1 if interleaved else -2)
        return np.concatenate([pairs.reshape(*x.shape[:-1], 4), x[..., 4:]], axis=-1)

    low = rms(x @ w["q_a/weight"], w["q_norm/weight"])
    k = x @ w["indexer/k/weight"]
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = turn((k * w["indexer/k_norm/weight"] + w["indexer/k_norm/bias"])[:, None], False)[:, 0]
    products = np.einsum("tnh,sh->tns", turn((low @ w["indexer/q/weight"]).reshape(length, 8, 6), False), k)
    scores = np.einsum("tn,tns->ts", x @ w["indexer/weight"] / 48**0.5, np.maximum(products, 0))
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    picked = scores >= np.sort(scores, axis=-1)[:, -top_k, None]
    picked &= np.tri(length, dtype=bool)

    q = (low @ w["q_b/weight"]).reshape(length, HEADS, 8)
    c, k_rope = np.split(x @ w["kv_a/weight"], [RANK], axis=-1)
    kv = (rms(c, w["kv_norm/weight"]) @ w["kv_b/weight"]).reshape(length, HEADS, 10)
    q = np.concatenate([q[..., :4], turn(q[..., 4:], True)], axis=-1)
    k = np.concatenate([kv[..., :4], np.repeat(turn(k_rope[:, None], True), HEADS, axis=1)], axis=-1)
    share = np.where(picked, np.exp(np.einsum("qnh,snh->nqs", q, k) * 8**-0.5), 0)
    out = np.einsum("nqs,snh->qnh", share / share.sum(-1, keepdims=True), kv[..., 4:])
    found, _ = part(jnp.asarray(x), Ragged.dense(1, length), None)
    np.testing.assert_allclose(found, out.reshape(length, -1) @ w["o/weight"], atol=1e-4)


def test_short_listings_are_dense(rng):
    """Where no more can be listed than is picked, the dense ops run, alone and over a cache, and the index does nothing."""
    part, length = layer(top_k=16), 12
    plain = ir.replace(part, indexer=None)
    plain.cache = part.cache.replace(streams=part.cache.streams[:1])
    x, ragged = jnp.asarray(rng.normal(size=(length, D)), jnp.float32), Ragged.dense(1, length)
    np.testing.assert_array_equal(part(x, ragged, None)[0], plain(x, ragged, None)[0])
    at = jnp.arange(length, dtype=jnp.int32)
    view = {
        "slots": at[:1], "positions": jnp.arange(20, dtype=jnp.int32).reshape(5, P), "table": at[None, None, :4],
        "lengths": jnp.asarray([[length]]), "writes": at,
    }  # fmt: skip
    layout = Layout(pages=4, page_size=P, slots=1)
    found, want = (m(x, ragged, View(pool=m.cache.init(layout), **view))[0] for m in (part, plain))
    np.testing.assert_array_equal(found, want)
    text = str(jax.make_jaxpr(lambda x: part(x, ragged, View(pool=part.cache.init(layout), **view))[0])(x))
    assert "top_k" not in text
    assert [site.op for site in part.op_sites()].count("indexed_attention") == 1
