"""Cases and benchmark shapes of `ragged_paged_attention`: prefill chunks and decodes over paged keys and values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from optx import formats
from optx.bench.cases import Case, Shape
from optx.bench.cases.paged_decode import FEW_BITS, MADE, both, stored
from optx.cache import Ragged
from optx.formats import Float8Static, Format
from optx.nn.attention import paged_spec
from optx.pallas.attention.reference import Mask
from optx.tensor import is_qtensor, quantize

OP = "ragged_paged_attention"


def batch(
    rng,
    counts,
    context,
    *,
    heads,
    kv_heads,
    head_dim,
    page_size,
    dtype,
    padding=0,
    gaps=False,
    lists=1,
    format=None,
    logit_scale=False,
    **kwargs,
):
    """A call: rows of `counts` new tokens on `context` cached ones, pages in random order.

    padding: tokens of no row at the end; gaps: positions with holes, as eviction leaves them; lists: page lists (G);
    format: of packed pages; logit_scale: whether cached tokens have one.
    Whatever no row has written, the last page, and padding's queries hold NaN.
    """
    counts, context = np.array(counts), np.array(context)
    length, size = counts + context, len(counts)
    pages = -(-length // page_size)
    total = int(pages.sum()) * lists
    order, taken = rng.permutation(total), 0
    table = np.full((lists, size, max(int(pages.max()), 1)), total, np.int32)
    positions = np.full((total + 1, page_size), -1, np.int32)
    pools = [np.full((total + 1, kv_heads, page_size, head_dim), np.nan, np.float32) for _ in "kv"]
    at = []  # positions of a row's cached tokens; the new ones follow without holes
    for old, new in zip(context, counts, strict=True):
        steps = np.ones(old + new, int)
        steps[:old] = rng.integers(1, 4, size=old) if gaps else 1
        at.append(np.cumsum(steps) - 1)
    for group in range(lists):
        for row in range(size):
            listed = order[taken : taken + pages[row]]
            table[group, row, : pages[row]] = listed
            taken += pages[row]
            for i, page in enumerate(listed):
                here = at[row][i * page_size : (i + 1) * page_size]
                positions[page, : len(here)] = here
                for pool in pools:
                    pool[page, slice(None) if lists == 1 else group, : len(here)] = rng.standard_normal(
                        (kv_heads, len(here), head_dim) if lists == 1 else (len(here), head_dim)
                    )
    rows = np.concatenate([np.repeat(np.arange(size), counts), np.full(padding, size)])
    asked = np.concatenate([at[row][context[row] :] for row in range(size)] + [np.zeros(padding, int)])
    q = rng.standard_normal((len(rows), heads, head_dim))
    q[rows == size] = np.nan
    ragged = Ragged(
        rows=jnp.asarray(rows, jnp.int32),
        starts=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        positions=jnp.asarray(asked, jnp.int32),
        longest=max(int(counts.max()), 1),
    )
    pools = [_packed(jnp.asarray(x, dtype), each) for x, each in zip(pools, _formats(format), strict=True)]
    args = (jnp.asarray(q, dtype), *pools)
    if logit_scale:
        scales = np.where(positions >= 0, rng.uniform(0.5, 1.5, positions.shape), np.nan)
        kwargs["logit_scale"] = jnp.asarray(np.repeat(scales[:, None], kv_heads, axis=1), jnp.float32)
    lengths = jnp.asarray(np.broadcast_to(length, (lists, size)), jnp.int32)
    return args, {
        "ragged": ragged,
        "positions": jnp.asarray(positions),
        "table": jnp.asarray(table),
        "lengths": lengths,
        **kwargs,
    }


def _formats(format) -> tuple[Format | None, Format | None]:
    """Of keys and of values: `format` is one for both, or its name, or a pair."""
    return both(formats.parse(format) if isinstance(format, str) else format)


def _packed(pool, format: Format | None):
    if format is None:
        return pool
    return quantize(pool if format.block_rows == 1 else jnp.nan_to_num(pool), format, axis=-1)


def real_tokens(output, kwargs):
    """out and lse of the tokens that belong to rows: what padding gets is unspecified."""
    ragged = kwargs["ragged"]
    real = np.flatnonzero(np.asarray(ragged.rows) < ragged.batch)
    return [*(x[real] for x in output[:2]), *output[2:] * kwargs.get("want_scores", False)]


def in_float32(args):
    """The arguments as the reference in float32 takes them: the same stored numbers, without a rounding in between."""
    wide = lambda x: dataclasses.replace(x, dtype=jnp.dtype("float32")) if is_qtensor(x) else x.astype("float32")  # noqa: E731
    return tuple(wide(x) for x in args)


def site(
    heads, kv_heads, head_dim, dtype="bfloat16", mask=Mask(), softcap=None, format=None, logit_scale=False, want_scores=False,  # noqa: B008 - frozen
):  # fmt: skip
    window = None if mask.window is None else max(mask.window, 1)
    spec = paged_spec(kv_heads, head_dim, dtype=dtype, window=window).replace(sinks=mask.sinks)
    spec = stored(spec, _formats(format) if format else None).replace(recent=mask.lag or 0, first=mask.skip)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "cache": spec,
        "mask": mask,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "want_scores": want_scores,
    }


def case(
    name,
    counts,
    context,
    *,
    heads=8,
    kv_heads=2,
    head_dim=64,
    page_size=16,
    dtype="bfloat16",
    small=False,
    tolerance=5e-3,
    **more,
):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}

    def make(rng):
        kwargs = {
            key: value(rng) if callable(value) and key in ("sink_logits", "prompts") else value
            for key, value in more.items()
        }
        return batch(rng, counts, context, **shape, page_size=page_size, dtype=dtype, **kwargs)

    asked = {key: more[key] for key in ("mask", "softcap", "format", "logit_scale", "want_scores") if key in more}
    facts = {"site": site(**shape, dtype=dtype, **asked), "small": small, "tolerance": tolerance}
    return Case(op=OP, name=name, make=make, pick=real_tokens, **facts)


def _newest(asked, prompts):
    """The last queries before a prompt's end count, the later ones twice."""
    return jnp.where((asked >= prompts[:, None] - 9) & (asked < prompts[:, None]), 1.0 + (asked % 2), 0)


MIXED = ([40, 1, 1, 130, 0, 17], [100, 70, 300, 513, 0, 0])
LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128}
SLIDING = Mask(window=90, sinks=4)
NARROW = {"heads": 4, "kv_heads": 1, "head_dim": 128, "page_size": 32}


def _sinks(rng, heads=32):
    return jnp.asarray(rng.standard_normal(heads), jnp.float32)


_sinks16 = functools.partial(_sinks, heads=16)


CASES = (
    case("small", [9, 1, 0, 1], [30, 70, 0, 5], kv_heads=1, padding=2, small=True),
    case(
        "small_window",
        [9, 1],
        [50, 70],
        kv_heads=1,
        mask=Mask(window=20, sinks=2),
        softcap=20.0,
        sink_logits=functools.partial(_sinks, heads=8),
        gaps=True,
        small=True,
    ),
    case("small_packed", [5, 1], [50, 70], kv_heads=1, format="int8", mask=Mask(lag=9, skip=5, block=8), small=True),
    case("small_waves", [40], [600], heads=6, kv_heads=3, small=True),
    case("small_exact", [5, 1], [50, 3], kv_heads=1, mask=Mask(window=0, sinks=5), small=True),
    *(
        case(f"small_{name}", [5, 1], [50, 70], **NARROW, format=value, small=True, tolerance=MADE.get(name, 5e-3))
        for name, value in FEW_BITS.items()
    ),
    case("small_scores", [9, 1, 0, 150], [30, 70, 0, 5], kv_heads=1, padding=2, want_scores=True, small=True),
    case(
        "small_scores_weighed",
        [9, 1, 140],
        [50, 70, 3],
        mask=Mask(window=120, sinks=2),
        softcap=20.0,
        small=True,
        want_scores=True,
        score_reduce="max",
        score_weights=_newest,
        prompts=lambda rng: jnp.asarray([59, 1000, 143], jnp.int32),
    ),
    case("scores", *MIXED, **LLAMA, page_size=64, padding=7, want_scores=True, sink_logits=_sinks),
    case("scores_int8", *MIXED, **LLAMA, page_size=64, format="int8", want_scores=True, score_reduce="max"),
    case("group_of_1_short", [70, 1], [10, 130], heads=2),
    case("small_fp8_static", [5, 1], [50, 70], kv_heads=1, format=Float8Static(), small=True),
    case("small_int8", [5, 1], [50, 70], kv_heads=1, format="int8_asym", small=True),
    *(case(f"page{size}", *MIXED, **LLAMA, page_size=size, padding=7) for size in (16, 32, 64, 128)),
    case("waves", [600, 300], [4000, 3700], **LLAMA, page_size=64, padding=7),
    case("fp16", *MIXED, **LLAMA, page_size=64, dtype="float16"),
    case("window", *MIXED, **LLAMA, mask=SLIDING, gaps=True, softcap=20.0, sink_logits=_sinks),
    case("window_int4", *MIXED, **LLAMA, mask=SLIDING, gaps=True, sink_logits=_sinks, format="int4"),
    case("packed_int4", *MIXED, **LLAMA, mask=Mask(lag=0, skip=4), format="int4_asym", page_size=64),
    case("exact", *MIXED, **LLAMA, mask=Mask(window=0, sinks=4), page_size=64),
    case("blocks_int8", *MIXED, **LLAMA, mask=Mask(lag=50, skip=9, block=32), format="int8", gaps=True, page_size=32),
    case("newest", *MIXED, **LLAMA, mask=Mask(window=50, sinks=9, block=32), gaps=True, sink_logits=_sinks),
    *(
        case(name, *MIXED, **LLAMA, format=value, page_size=64, tolerance=MADE.get(name, 5e-3))
        for name, value in FEW_BITS.items()
    ),
    case("fp8_static", *MIXED, **LLAMA, format=Float8Static(), page_size=64),
    case(
        "kivi4_page128",
        *MIXED,
        **LLAMA,
        format=FEW_BITS["kivi4"],
        page_size=128,
        mask=Mask(lag=128, block=32),
        tolerance=MADE["kivi4"],
    ),
    case("not_causal", *MIXED, **LLAMA, mask=Mask(causal=False), logit_scale=True),
    case("every_head_its_key", *MIXED, heads=8, kv_heads=8, head_dim=128, page_size=32),
    case("group_of_2", *MIXED, heads=8, kv_heads=4, head_dim=128, page_size=64),
    case("group_of_3", *MIXED, heads=6, kv_heads=2, head_dim=64, page_size=64),
    case("group_of_16", *MIXED, heads=32, kv_heads=2, head_dim=128, page_size=64),
    case("head_dim_256", *MIXED, heads=16, kv_heads=4, head_dim=256, page_size=128),
    *(
        case(f"head_dim_256_{name}", *MIXED, heads=4, kv_heads=1, head_dim=256, page_size=size, mask=mask)
        for name, size, mask in (("page64", 64, Mask()), ("page16", 16, Mask()), ("window", 64, SLIDING))
    ),
    case("lists_by_head", *MIXED, heads=16, kv_heads=4, head_dim=128, page_size=32, lists=4, sink_logits=_sinks16),
    case("decodes", [1] * 20, list(range(0, 1000, 50)), **LLAMA, page_size=64),
    case("long", [300, 1, 2], [3000, 4000, 100], **LLAMA, page_size=64),
    *(
        case(f"{name}_{dim}", *MIXED, heads=8, kv_heads=2, head_dim=dim, page_size=32, format=name)
        for dim, names in ((64, ("int8", "int4_asym")), (128, ("int8", "int8_asym", "int4", "int4_asym", "fp8_e4m3")))
        for name in names
    ),
    case("int8_asym_page16", *MIXED, **LLAMA, page_size=16, format="int8_asym"),
    case(
        "fp8_page16_window", *MIXED, **LLAMA, page_size=16, format="fp8_e4m3", mask=SLIDING, gaps=True, logit_scale=True
    ),
    case("int8_256", *MIXED, heads=8, kv_heads=2, head_dim=256, page_size=64, format="int8"),
)


def call(rng, counts, context, *, heads, kv_heads, head_dim, page_size, dtype="bfloat16", format=None, **more):
    """As `batch`, large: pools are made on the device, pages of a row lie scattered, nothing is poisoned."""
    counts, length = np.array(counts), np.array(counts) + np.array(context)
    pages = -(-length // page_size)
    total, size = int(pages.sum()), len(counts)
    order = rng.permutation(total)
    table = np.full((1, size, int(pages.max())), total, np.int32)
    positions = np.zeros((total + 1, page_size), np.int32)
    for row, first in enumerate(np.cumsum(pages) - pages):
        listed = order[first : first + pages[row]]
        table[0, row, : pages[row]] = listed
        positions[listed] = np.arange(pages[row] * page_size).reshape(-1, page_size)
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 3)
    shape = (total + 1, kv_heads, page_size, head_dim)
    pools = [_pool(key, shape, dtype, each) for key, each in zip(keys, _formats(format), strict=False)]
    ragged = Ragged(
        rows=jnp.asarray(np.repeat(np.arange(size), counts), jnp.int32),
        starts=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
        counts=jnp.asarray(counts, jnp.int32),
        positions=jnp.asarray(
            np.concatenate([np.arange(n - c, n) for n, c in zip(length, counts, strict=True)]), jnp.int32
        ),
        longest=int(counts.max()),
    )
    q = jax.random.normal(keys[2], (int(counts.sum()), heads, head_dim), dtype)
    return (q, *pools), {
        "ragged": ragged,
        "positions": jnp.asarray(positions),
        "table": jnp.asarray(table),
        "lengths": jnp.asarray(length[None], jnp.int32),
        **more,
    }


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pool(key, shape, dtype, format):
    made = jax.lax.map(
        lambda key: jax.random.normal(key, shape[1:], dtype), jax.random.split(key, shape[0]), batch_size=64
    )
    return _packed(made, format)


def shape(name, counts, context, page_size, *, heads=32, kv_heads=8, head_dim=128, format=None, scores=None):
    """scores: queries at the end that count in what is recorded; None: nothing is."""
    counts, context = np.array(counts), np.array(context)
    asked = {} if scores is None else {"want_scores": True, "score_weights": functools.partial(_last, scores)}
    token = sum(head_dim * (16 if each is None else each.bits(head_dim)) / 8 for each in _formats(format))
    read = kv_heads * token * float(np.sum(counts + context))
    pairs = float(np.sum(counts * context + counts * (counts + 1) / 2))
    tokens = 2 * 2 * heads * head_dim * float(np.sum(counts))  # queries and results
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return Shape(
        op=OP,
        name=f"{name}_page{page_size}",
        make=lambda rng: call(rng, counts, context, **sizes, page_size=page_size, format=format, **asked),
        site=site(heads, kv_heads, head_dim, format=format, want_scores=scores is not None),
        bytes=read + tokens,
        flops=4 * heads * head_dim * pairs,
        both="decodes" in name and "chunk" in name,
    )


def _last(count: int, asked, prompts):
    return (asked > jnp.max(asked, axis=1, keepdims=True) - count).astype(jnp.float32)


DECODES = ([1] * 64, [8191] * 64)
SHAPES = (
    *(shape("chunk2k_on_8k_and_64_decodes", [2048, *DECODES[0]], [8192, *DECODES[1]], size) for size in (64, 16)),
    shape("chunk2k_on_8k", [2048], [8192], 64),
    shape("chunk2k", [2048], [0], 64),
    shape("scores_of_64_chunk2k_on_8k", [2048], [8192], 64, scores=64),
    shape("scores_chunk2k_on_8k", [2048], [8192], 64, scores=2048),
    shape("64_decodes_8k", *DECODES, 64),
    shape("int8_chunk2k_on_8k_and_64_decodes", [2048, *DECODES[0]], [8192, *DECODES[1]], 64, format="int8"),
    shape("int8_chunk2k_on_8k", [2048], [8192], 64, format="int8"),
    shape("int8_64_decodes_8k", *DECODES, 64, format="int8"),
    *(
        shape(f"{name}_chunk2k_on_8k", [2048], [8192], 64, format=FEW_BITS[name])
        for name in ("oscar2", "kivi4", "turbo4")
    ),
)
