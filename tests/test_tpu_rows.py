"""The TPU rows of five ops: behaviour against the references in Pallas' interpreter, refusals, and real compiles by libtpu.

The interpreter runs what the kernel computes but knows no TPU: whether it compiles is what `tpu_compile.py` asks libtpu,
ahead of time, for three generations. Neither says anything of speed.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optx import formats, target, tensor
from optx.cache import CacheSpec, Ragged, Stream
from optx.errors import LoweringError
from optx.nn.attention import paged_spec
from optx.pallas.attention import reference
from optx.pallas.attention.reference import Mask
from optx.pallas.flash_attention import mosaic_tpu as flash
from optx.pallas.grouped_matmul import mosaic_tpu as grouped
from optx.pallas.grouped_matmul import reference as grouped_reference
from optx.pallas.paged_decode import mosaic_tpu as paged_decode
from optx.pallas.quant_matmul import mosaic_tpu as quant
from optx.pallas.quant_matmul import reference as quant_reference
from optx.pallas.ragged_paged_attention import mosaic_tpu as ragged_attention
from optx.pallas.tpu_matmul import Tiles

TPUS = [target.TARGETS[name] for name in ("tpu-v5e", "tpu-v6e", "tpu-v7x")]
EXACT = 3e-5  # float32 against float32


def close(got, want, tolerance=EXACT):
    for name, g, w in zip(("out", "lse"), got, want):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        finite = np.isfinite(w)
        assert np.array_equal(finite, np.isfinite(g)), f"{name}: not finite in other places"
        assert np.array_equal(g[~finite], w[~finite]), f"{name}: other infinities"
        error = np.abs(g[finite] - w[finite]).max(initial=0) / max(np.abs(w[finite]).max(initial=0), 1e-6)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def interpreted(function, *args):
    """function(*args), compiled as one program with as little optimisation as XLA offers: it runs once."""
    lowered = jax.jit(function).lower(*args)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(*args)


# Paged caches.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
    """Rows with `lengths` cached tokens, the newest `counts` of them asking."""

    lengths: tuple[int, ...] = (40, 1, 0, 33)
    counts: tuple[int, ...] = (1, 1, 0, 1)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    page: int = 16
    format: str | None = None
    dtype: str = "float32"  # of q, and of pages without a format
    mask: Mask = Mask()
    softcap: float | None = None
    sink: bool = False
    gaps: bool = False
    lists: int = 1
    value_dim: int | None = None  # MLA latents
    logit_scale: bool = False
    pages: int = 2  # a block
    queries: int = 8  # tokens an item of a ragged call


def pool_of(rng, case: Paged, total: int, held: np.ndarray):
    """A pool whose slots that hold nothing are NaN wherever their type has one. held: bool[total + 1, K, P]."""
    x = rng.standard_normal((total + 1, case.kv_heads, case.page, case.head_dim)).astype(np.float32)
    if case.format is None:
        return jnp.asarray(np.where(held[..., None], x, np.nan), case.dtype)
    packed = tensor.quantize(jnp.asarray(x), formats.parse(case.format), axis=-1)
    bad = jax.tree.map(
        lambda part: jnp.where(held[..., None], part, jnp.nan) if jnp.issubdtype(part.dtype, jnp.floating) else part,
        packed,
    )
    return dataclasses.replace(jax.tree.map(lambda b, p: b.astype(p.dtype), bad, packed), dtype=jnp.dtype(case.dtype))


def paged_call(rng, case: Paged):
    """(q [T, N, H], k_pool, v_pool), what both ops take by name, and the batch."""
    lengths, counts = np.array(case.lengths), np.array(case.counts)
    b, page = len(lengths), case.page
    width = max(int(-(-lengths.max() // page)), 1) + 1
    total = b * width * case.lists
    table = rng.permutation(total).reshape(case.lists, b, width).astype(np.int32)
    positions = np.full((total + 1, page), -1, np.int32)
    held = np.zeros((total + 1, case.kv_heads, page), bool)
    asked = []
    for row in range(b):
        at = np.cumsum(rng.integers(1, 4, lengths[row]) if case.gaps else np.ones(lengths[row], int)) - 1
        asked.append(at[lengths[row] - counts[row] :])
        for group in range(case.lists):
            slots = table[group, row, np.arange(lengths[row]) // page], np.arange(lengths[row]) % page
            positions[slots] = at
            held[slots[0], :, slots[1]] = True
    q = rng.standard_normal((sum(counts) + 3, case.heads, case.head_dim))
    q[-3:] = np.nan  # padding
    ragged = Ragged(
        rows=jnp.asarray(np.repeat(np.arange(b + 1), [*counts, 3]), jnp.int32),
        starts=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        positions=jnp.asarray(np.concatenate([*asked, np.zeros(3)]), jnp.int32),
        longest=max(int(counts.max()), 1),
    )
    k = pool_of(rng, case, total, held)
    kwargs = {
        "positions": jnp.asarray(positions),
        "table": jnp.asarray(table),
        "lengths": jnp.asarray(np.broadcast_to(lengths, (case.lists, b)), jnp.int32),
        "mask": case.mask,
        "softcap": case.softcap,
        "sink_logits": jnp.asarray(rng.standard_normal(case.heads), jnp.float32) if case.sink else None,
        "logit_scale": None,
        "value_dim": case.value_dim,
    }
    if case.logit_scale:
        scale = np.where(held, rng.uniform(0.5, 1.5, held.shape), np.nan)
        kwargs["logit_scale"] = jnp.asarray(scale, jnp.float32)
    v = None if case.value_dim else pool_of(rng, case, total, held)
    return (jnp.asarray(q, case.dtype), k, v), kwargs, ragged


def run_decode(args, kwargs, ragged, **how):
    q, *pools = args
    q_positions = jnp.where(ragged.valid, ragged.pad(ragged.positions), -1)
    return paged_decode.paged_decode(ragged.pad(q), *pools, q_positions=q_positions, **kwargs, **how)[:2]


def want_decode(args, kwargs, ragged, **static):
    q, *pools = args
    q, at = ragged.pad(q).astype(jnp.float32), jnp.where(ragged.valid, ragged.pad(ragged.positions), -1)
    return reference.paged_attention(q, *pools, q_positions=at, **kwargs, **static)[:2]


DECODE = {
    "bfloat16": Paged(dtype="bfloat16", counts=(2, 1, 0, 2)),
    "masks": Paged(mask=Mask(window=9, sinks=5), softcap=3.0, sink=True, gaps=True, lengths=(70, 1, 0, 33)),
    "many_heads": Paged(heads=9, kv_heads=9, lengths=(20, 3), counts=(1, 1)),
    "int8_asym_lists_by_head": Paged(lists=2, format="int8_asym", page=32),
    "int4_turned": Paged(format="int4", page=128, lengths=(200, 1, 0, 300)),
    "int4_asym": Paged(format="int4_asym", head_dim=256),
    "int2_packed": Paged(format="int2_asym", page=128, lengths=(200, 1, 0, 300), mask=Mask(lag=9, skip=4, block=8)),
    "exact": Paged(mask=Mask(window=9, sinks=4, block=8), gaps=True),
    "exact_first_tokens": Paged(mask=Mask(window=0, sinks=4)),
    "fp8": Paged(format="fp8_e4m3", page=32),
    "turned": Paged(head_dim=64, page=128, lengths=(200, 1, 0, 300)),
    "latents": Paged(kv_heads=1, head_dim=256, value_dim=128, logit_scale=True),
}


@pytest.mark.parametrize("name", DECODE)
def test_paged_decode(name, rng):
    case = DECODE[name]
    args, kwargs, ragged = paged_call(rng, case)
    static = {key: kwargs.pop(key) for key in ("mask", "softcap", "value_dim")}
    how = {"interpret": True, "tiles": paged_decode.Tiles(queries=1, pages=case.pages)}
    got = interpreted(lambda *call: run_decode(*call, **static, **how), args, kwargs, ragged)
    want = interpreted(lambda *call: want_decode(*call, **static), args, kwargs, ragged)
    close(got, want, 2e-2 if case.dtype == "bfloat16" else EXACT)


def test_twice_the_same_bits(rng):
    """Also where what is not read holds something else."""
    case = Paged(lengths=(40, 3), counts=(1, 1), kv_heads=1)
    (q, *pools), kwargs, ragged = paged_call(rng, case)
    static = {key: kwargs.pop(key) for key in ("mask", "softcap", "value_dim")}
    run = jax.jit(lambda args: run_decode(args, kwargs, ragged, interpret=True, **static))
    first, again, other = (run((q, *p)) for p in (pools, pools, [jnp.where(jnp.isnan(x), 3e38, x) for x in pools]))
    for a, b, c in zip(first, again, other):
        assert np.array_equal(a, b) and np.array_equal(a, c)


RAGGED = {
    "mixed": Paged(lengths=(70, 1, 0, 33, 20), counts=(19, 1, 0, 1, 20), heads=16, format="int8"),
    "masks": Paged(lengths=(70, 1, 0, 33), counts=(19, 1, 0, 1), mask=Mask(window=9, sinks=5), gaps=True, sink=True),
    "all_see_all": Paged(lengths=(40, 3), counts=(10, 3), mask=Mask(causal=False), lists=2),
    "packed": Paged(lengths=(70, 1, 0, 33), counts=(19, 1, 0, 1), mask=Mask(lag=0, skip=4), format="int8_asym"),
    "exact": Paged(lengths=(70, 1, 0, 33), counts=(19, 1, 0, 1), mask=Mask(window=9, sinks=4, block=8)),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_paged_attention(name, rng):
    case = RAGGED[name]
    (q, *pools), kwargs, ragged = paged_call(rng, case)
    static = {key: kwargs.pop(key) for key in ("mask", "softcap", "value_dim")}
    how = {"interpret": True, "tiles": ragged_attention.Tiles(queries=case.queries, pages=case.pages)}
    got = interpreted(
        lambda q, pools, ragged, kwargs: ragged_attention.ragged_paged_attention(
            q, *pools, ragged=ragged, **kwargs, **static, **how
        )[:2],
        *(q, pools, ragged, kwargs),
    )
    want = interpreted(
        lambda q, pools, ragged, kwargs: reference.ragged_paged_attention(q, *pools, ragged=ragged, **kwargs, **static)[
            :2
        ],
        *(jnp.nan_to_num(q), pools, ragged, kwargs),
    )
    real = slice(0, sum(case.counts))
    close([x[real] for x in got], [x[real] for x in want])


# Self-contained sequences.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """B = 2 sequences of `length`, cut into blocks of 16 queries and 32 keys."""

    length: int = 70
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: str = "float32"
    mask: Mask = Mask()
    softcap: float | None = None
    sink: bool = False
    counts: tuple[int, int] | None = None  # real tokens of each sequence; what follows is NaN
    segments: bool = False


DENSE = {
    "causal": Dense(),
    "all_see_all": Dense(mask=Mask(causal=False), kv_heads=1, head_dim=24),
    "masks": Dense(mask=Mask(window=20, sinks=3), softcap=2.0, sink=True, kv_heads=4),
    "counts": Dense(counts=(41, 0)),
    "segments": Dense(segments=True, counts=(70, 9), mask=Mask(window=9), sink=True, heads=6),
    "short_bfloat16": Dense(length=5, dtype="bfloat16", value_dim=8),
}


@pytest.mark.parametrize("name", DENSE)
def test_flash_attention(name, rng):
    case = DENSE[name]
    lead = (2, case.length)
    q = rng.standard_normal((*lead, case.heads, case.head_dim))
    k = rng.standard_normal((*lead, case.kv_heads, case.head_dim))
    v = rng.standard_normal((*lead, case.kv_heads, case.value_dim))
    optional = {"sink_logits": jnp.asarray(rng.standard_normal(case.heads), jnp.float32) if case.sink else None}
    if case.counts:
        valid = np.arange(case.length) < np.array(case.counts)[:, None]
        optional["valid"] = jnp.asarray(valid)
    if case.segments:
        optional["segments"] = jnp.asarray(np.sort(rng.integers(0, 4, lead)), jnp.int32)
    arrays = [jnp.asarray(x, case.dtype) for x in (q, k, v)]
    poison = arrays
    if case.counts:
        poison = [arrays[0], *(jnp.where(valid[..., None, None], x, jnp.nan) for x in arrays[1:])]
    static = {"mask": case.mask, "softcap": case.softcap}
    how = {"interpret": True, "tiles": flash.Tiles(queries=16, keys=32)}
    got = interpreted(lambda arrays, kw: flash.flash_attention(*arrays, **kw, **static, **how)[:2], poison, optional)
    want = interpreted(
        lambda arrays, kw: reference.flash_attention(*(x.astype(jnp.float32) for x in arrays), **kw, **static)[:2],
        *(arrays, optional),
    )
    close(got, want, 2e-2 if case.dtype == "bfloat16" else EXACT)


# Packed weights.


def matrix(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape) / 8, dtype)


def same(got, want, tolerance=EXACT):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < tolerance, f"relative error {error:.2e}"


QUANT = ("int8", "int8_g64_asym", "int4_g32", "int4_g128_asym", "int4_g256", "int4", "int2_g64_asym", "fp8_e5m2_g128")
FEW, MANY = Tiles(tokens=16, outputs=128), Tiles(tokens=16, outputs=128, dequantize=True)


@pytest.mark.parametrize("cut", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("format_", QUANT)
def test_quant_matmul(format_, cut, rng):
    x, w = matrix(rng, 19, 512), tensor.quantize(matrix(rng, 512, 160), formats.parse(format_))
    got = interpreted(lambda x, w: quant.quant_matmul(x, w, tiles=cut, interpret=True), x, w)
    same(got, jax.jit(quant_reference.quant_matmul)(x, w))


@pytest.mark.parametrize(
    "weights, activations", [("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("int4_g64", "int8_g128")]
)
def test_quant_matmul_of_rounded_activations(weights, activations, rng):
    x, w = matrix(rng, 3, 2, 256), tensor.quantize(matrix(rng, 256, 128), formats.parse(weights))
    activations = formats.parse(activations)
    got = interpreted(lambda x, w: quant.quant_matmul(x, w, activations, interpret=True), x, w)
    same(got, jax.jit(lambda x, w: quant_reference.quant_matmul(x, w, activations))(x, w), 1e-4)


GROUPS = {
    "plain": (5, 16, 0, 21, 3),
    "rows_past_the_sum": (0, 7, 0, 9, 1),
    "none": (0, 0, 0, 0, 0),
    "one": (0, 0, 45, 0, 0),
    "more_than_there_are": (40, 0, 10, 3, 3),
}


@pytest.mark.parametrize("name", GROUPS)
def test_visits_of_grouped_matmul(name):
    """Every row with an expert is in one visit of it, every tile is visited, and the list has room."""
    sizes, tokens, size = np.array(GROUPS[name]), 45, 16
    tile, expert, start, stop, first, fresh = np.asarray(grouped.schedule(jnp.asarray(sizes), tokens, size))
    owner = np.full(48, -1)
    for t, e, a, b in zip(tile, expert, start, stop):
        assert (owner[t * size + a : t * size + b] == -1).all()
        owner[t * size + a : t * size + b] = e
    want = np.repeat(np.arange(len(sizes)), sizes)[:tokens]
    assert np.array_equal(owner[: len(want)], want) and (owner[len(want) :] == -1).all()
    assert np.array_equal(tile[first == 1], np.arange(3)) and (np.diff(tile) >= 0).all()
    assert np.array_equal(fresh[1:], np.diff(expert) != 0) and (np.diff(expert) >= 0).all()
    assert set(expert) <= set(np.flatnonzero(sizes)) or not sizes.any(), "weights of an idle expert are copied"


@pytest.mark.parametrize("cut", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("format_", [None, "int8", "int4_g64_asym", "fp8_e4m3_g128"])
def test_grouped_matmul(format_, cut, rng):
    if format_ is None:
        cut = dataclasses.replace(cut, dequantize=False)
    sizes = jnp.asarray(GROUPS["rows_past_the_sum" if cut is FEW else "plain"], jnp.int32)
    x, w = matrix(rng, 45, 256), matrix(rng, 5, 256, 256)
    w = w if format_ is None else tensor.quantize(w, formats.parse(format_))
    total = int(sizes.sum())
    x = x.at[total:].set(jnp.nan)
    got = interpreted(lambda *args: grouped.grouped_matmul(*args, tiles=cut, interpret=True), x, w, sizes)
    same(got, jax.jit(grouped_reference.grouped_matmul)(x, w, sizes))
    assert not np.asarray(got[total:]).any()


@pytest.mark.parametrize("format_", ["int4_g64", "int4_asym"])
def test_quant_matmul_in_bfloat16(format_, rng):
    """Few tokens of bfloat16 take another way from bytes to numbers."""
    x, w = matrix(rng, 5, 512, dtype="bfloat16"), tensor.quantize(matrix(rng, 512, 256), formats.parse(format_))
    got = interpreted(lambda x, w: quant.quant_matmul(x, w, interpret=True), x, w)
    same(got, x.astype(jnp.float32) @ w.dequantize(), 6e-3)


# What the rows decline and refuse.


def attention_site(head_dim=128, format_=None, dtype="bfloat16", recent=0, first=0, **facts):
    spec = paged_spec(2, head_dim, dtype=dtype).replace(format=format_ and formats.parse(format_))
    spec = spec.replace(recent=recent, first=first)
    return {"heads": 8, "kv_heads": 2, "head_dim": head_dim, "cache": spec, "page_size": 64, **facts}


def weight_site(format_, *shape, **facts):
    dense = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return {"weight": tensor.quantize(dense, formats.parse(format_)) if format_ else dense, **facts}


LATENT = CacheSpec(kind="latent", streams=(Stream(name="latent", shape=(1, 576)),), dtype="bfloat16")
TAKEN = [
    (paged_decode, attention_site()),
    (paged_decode, attention_site(256, "int8", page_size=16)),
    (paged_decode, attention_site(64, "int4", page_size=128)),
    (paged_decode, attention_site(format_="int2_asym", page_size=128)),
    (paged_decode, attention_site(format_="int4_asym", page_size=128, recent=128, first=4)),
    (paged_decode, attention_site(cache=LATENT, kv_heads=1, value_dim=512)),
    (ragged_attention, attention_site(format_="fp8_e4m3")),
    (ragged_attention, {key: fact for key, fact in attention_site().items() if key != "page_size"}),
    (flash, attention_site(80)),
    (flash, {"head_dim": 192, "value_dim": 128, "heads": 16, "kv_heads": 16, "dtype": "float32"}),
    (quant, weight_site("int4_g64_asym", 512, 96)),
    (quant, weight_site("int8", 512, 96, activations=formats.parse("int8"))),
    (grouped, weight_site("int8", 4, 512, 96)),
    (grouped, weight_site(None, 4, 512, 256)),
]
DECLINED = [
    (paged_decode, attention_site(64), "64 entries a head in pages of 64 .* allowed: pages of 128"),
    (paged_decode, attention_site(64, page_size=None), "unknown size"),
    (paged_decode, attention_site(page_size=48), "pages of 48 tokens; allowed: 16, 32, 64, 128"),
    (paged_decode, attention_site(format_="int4_g32"), "one scale a token and head"),
    (paged_decode, attention_site(dtype="float16"), "pages of float16"),
    (paged_decode, attention_site(want_scores=True), "no scores"),
    (ragged_attention, attention_site(format_="int2"), "32 entries a head in pages of 64"),
    (ragged_attention, attention_site(format_="int3"), "pages in int3"),
    (flash, attention_site(dtype="float16"), "activations in float16"),
    (flash, attention_site(100), "heads of 100 entries"),
    (quant, weight_site("int3", 512, 96), "weights in int3"),
    (quant, weight_site("int4", 640, 96), "640 numbers of int4 .* multiples of 256"),
    (quant, weight_site("int8_g96", 768, 96), "groups of 96"),
    (quant, weight_site("int8", 512, 96, dtype="float16"), "activations in float16"),
    (grouped, weight_site(None, 4, 512, 96), "96 numbers of a dense matrix"),
]


@pytest.mark.parametrize("module, site", TAKEN)
@pytest.mark.parametrize("tpu", TPUS, ids=lambda t: t.name)
def test_rows_take(module, site, tpu):
    assert module.supports(site, tpu) is None


@pytest.mark.parametrize("module, site, reason", DECLINED)
def test_rows_decline(module, site, reason):
    assert re.search(reason, module.supports(site, TPUS[1]) or "it does not")


@pytest.mark.parametrize("module, site", list(dict(TAKEN).items()))
def test_rows_decline_other_targets(module, site):
    assert "tpu v5e, v6e, v7x" in module.supports(site, target.TARGETS["h100"])


def test_fp8_activations_need_a_unit_for_them():
    site = weight_site("fp8_e4m3", 512, 96, activations=formats.parse("fp8_e4m3"))
    reasons = [quant.supports(site, tpu) for tpu in TPUS]
    assert "no fp8 matrix unit" in reasons[0] and "no fp8 matrix unit" in reasons[1] and reasons[2] is None


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


REFUSED = {
    "flash_attention .* q's dtype is float16": lambda: flash.flash_attention(
        *[zeros(1, 4, 2, 8, dtype=jnp.float16)] * 3
    ),
    "flash_attention .* k, v is": lambda: flash.flash_attention(zeros(1, 4, 2, 8), *[zeros(1, 5, 2, 8)] * 2),
    "flash_attention .* valid is": lambda: flash.flash_attention(*[zeros(1, 4, 2, 8)] * 3, valid=zeros(1, 4)),
    "quant_matmul .* w is float": lambda: quant.quant_matmul(zeros(4, 128), zeros(128, 128)),
    "quant_matmul .* x is": lambda: quant.quant_matmul(
        zeros(4, 64), tensor.quantize(zeros(128, 8), formats.parse("int8"))
    ),
    "grouped_matmul .* group_sizes is": lambda: grouped.grouped_matmul(
        zeros(4, 128), zeros(2, 128, 128), zeros(3, dtype=jnp.int32)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_rows_refuse(message):
    with pytest.raises(LoweringError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"want_scores": True}, "want_scores is True"),
        ({"lengths": zeros(1, 9, dtype=jnp.int32)}, "table, lengths"),
        ({"sink_logits": zeros(3)}, r"sink_logits is \[3\]; allowed: \[4\]"),
        ({"table": zeros(1, 2, 1 << 17, dtype=jnp.int32), "lengths": zeros(1, 2, dtype=jnp.int32)}, "scalar memory"),
    ],
)
def test_paged_rows_refuse(change, message, rng):
    args, kwargs, ragged = paged_call(rng, Paged(lengths=(40, 3), counts=(1, 1)))
    with pytest.raises(LoweringError, match=f"ragged_paged_attention .*{message}"):
        ragged_attention.ragged_paged_attention(*args, ragged=ragged, **(kwargs | change))
    if len(change) == 1:
        with pytest.raises(LoweringError, match=f"paged_decode .*{message}"):
            run_decode(args, kwargs | change, ragged)


# Real compiles.


@pytest.mark.slow
def test_libtpu_compiles_every_row():
    """For three generations, in a process of its own."""
    apart = Path(sys.prefix) / "libtpu"  # where `make setup` puts it
    if not apart.exists() and importlib.util.find_spec("libtpu") is None:
        pytest.skip(
            "libtpu is not installed: the TPU kernels were NOT compiled. `make setup` installs it on Linux x86_64"
        )
    helper = Path(__file__).with_name("tpu_compile.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(apart), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, helper, "v5e", "v6e", "v7x"], capture_output=True, text=True, env=env)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-3000:]
    failed = [f"{line['arch']} {line['name']}: {line['error']}" for line in lines if "error" in line]
    assert not failed, "\n".join(failed)
    assert all(line["kernels"] for line in lines)
    rows = {(line["arch"], line["name"].split("/")[0]) for line in lines}
    assert len(rows) == 15, f"five rows for three generations, got {sorted(rows)}"
