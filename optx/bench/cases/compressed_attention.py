"""Cases and benchmark shapes of `compressed_attention`: one new token a row over compressed ones."""

import functools

import jax.numpy as jnp
import numpy as np

from optx.bench.cases import Case, Shape
from optx.nn.attention import paged_spec

OP = "compressed_attention"


def batch(
    rng, lengths, *, heads, kv_heads, head_dim, page_size, every=16, size=32, queries=1, dtype="bfloat16", **more
):
    """A call: rows of `lengths` cached tokens, the newest of them the queries'. Pages lie in random order; entries that no row
    has hold NaN."""
    lengths, each = np.array(lengths), page_size // every
    pages = -(-lengths // page_size)
    total = int(pages.sum())
    order, taken = rng.permutation(total), 0
    table = np.full((1, len(lengths), max(int(pages.max()), 1)), total, np.int32)
    written = np.zeros((total + 1, 1, each, 1), bool)
    for row, length in enumerate(lengths):
        listed = order[taken : taken + pages[row]]
        table[0, row, : len(listed)] = listed
        taken += len(listed)
        for entry in range(size // every - 1, length // every):
            written[listed[entry // each], :, entry % each] = True
    shape = (total + 1, kv_heads, each, head_dim)
    k, v = (jnp.asarray(np.where(written, rng.standard_normal(shape), np.nan), dtype) for _ in range(2))
    asked = lengths[:, None] - queries + np.arange(queries)
    asked[asked < 0] = -1
    q = jnp.asarray(rng.standard_normal((len(lengths), queries, heads, head_dim)), dtype)
    where = {"table": table, "lengths": lengths[None].astype(np.int32), "q_positions": asked.astype(np.int32)}
    kwargs = {name: jnp.asarray(x) for name, x in where.items()}
    return (q, k, v), kwargs | {"every": every, "size": size, "scale": head_dim**-0.5, **more}


def site(heads, kv_heads, head_dim, page_size, every=16, size=32, dtype="bfloat16"):
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    return {**sizes, "every": every, "size": size, "cache": paged_spec(kv_heads, head_dim, dtype=dtype)}


def case(name, lengths, *, heads=32, kv_heads=8, head_dim=128, page_size=64, small=False, **more):
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    sizes |= {key: more.pop(key) for key in ("every", "size", "dtype") if key in more}
    make = functools.partial(batch, lengths=lengths, **sizes, **more)
    return Case(op=OP, name=name, make=make, site=site(**sizes), small=small)


ROWS = [300, 1, 0, 64, 777, 65, 31, 33]
TINY = {"heads": 16, "kv_heads": 4, "head_dim": 64, "small": True}
CASES = (
    case("tiny", [300, 31, 0, 71], **TINY),
    case("tiny_queries", [200, 2], queries=3, softcap=20.0, **TINY),
    case("tiny_means", [150], every=8, size=8, page_size=32, **TINY),
    case("rows", ROWS),
    case("long", [30000, 47]),
    case("many_rows", [300 * i for i in range(40)]),
    case("queries", ROWS, queries=4),
    case("softcap", ROWS, softcap=20.0),
    case("fp16", ROWS, dtype="float16"),
    case("page128", ROWS, page_size=128),
    case("group8", ROWS, heads=64, page_size=128),
    case("dim64_stride8", ROWS, head_dim=64, every=8, size=32),
)


def shape(name, rows, context):
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 64}
    read = 2 * rows * context // 16 * 8 * 128 * 2
    make = functools.partial(batch, lengths=[context] * rows, **sizes)
    return Shape(op=OP, name=name, make=make, site=site(**sizes), bytes=read, flops=2 * read * 4)


SHAPES = (shape("2x64k", 2, 65536), shape("16x64k", 16, 65536))
