"""Cases and benchmark shapes of `flash_attention`: every mask, head dim, length and dtype that the kernel has code for."""

import jax
import jax.numpy as jnp
import numpy as np

from optx.bench import timing
from optx.bench.cases import Case, Shape
from optx.pallas.attention.reference import Mask

OP = "flash_attention"


def tensors(rng, batch, length, heads, kv_heads, head_dim, value_dim, dtype):
    """Random q, k and v, made on the host: small enough."""
    widths = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
    return tuple(jnp.asarray(rng.standard_normal((batch, length, n, h)), dtype) for n, h in widths)


def draw_sinks(rng, heads, **_):
    return jnp.asarray(rng.standard_normal(heads), jnp.float32)


def draw_valid(rng, batch, length, **_):
    """Rows of different lengths, the first one whole, and a hole in each."""
    real = rng.integers(1, length + 1, size=(batch, 1))
    real[0] = length
    at = np.arange(length)
    hole = rng.integers(0, length, size=(batch, 1))
    return jnp.asarray((at < real) & ((at < hole) | (at >= hole + length // 8)))


def draw_segments(rng, batch, length, **_):
    """Packed sequences of random lengths, numbered as they come."""
    starts = rng.random((batch, length)) < 6 / length
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def draw_no_keys(rng, batch, length, **_):
    """The first row has no real token at all."""
    return jnp.asarray(rng.random((batch, length)) < 0.5).at[0].set(False)


def site(heads, kv_heads, head_dim, value_dim, dtype="bfloat16", mask=Mask(), softcap=None):  # noqa: B008 - frozen
    """What lowering knows of the call."""
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "dtype": dtype,
        "mask": mask,
        "softcap": softcap,
    }


def results(output, kwargs):
    """out and lse."""
    return list(output[:2])


def case(
    name,
    length,
    *,
    batch=1,
    heads=8,
    kv_heads=None,
    head_dim=128,
    value_dim=None,
    dtype="bfloat16",
    small=False,
    draw=None,
    **static,
):
    """draw: {argument: function of (rng, batch, length, heads) that makes it}."""
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim

    def make(rng):
        args = tensors(rng, batch, length, heads, kv_heads, head_dim, value_dim, dtype)
        made = {key: f(rng, batch=batch, length=length, heads=heads) for key, f in (draw or {}).items()}
        return args, {**made, **static}

    asked = {key: static[key] for key in ("mask", "softcap") if key in static}
    about = site(heads, kv_heads, head_dim, value_dim, dtype, **asked)
    return Case(op=OP, name=name, make=make, site=about, small=small, pick=results)


FULL = Mask(causal=False)
WIDTHS = {"hd64": {"head_dim": 64}, "hd128": {}, "mla": {"head_dim": 192, "value_dim": 128}, "hd256": {"head_dim": 256}}
SINKS, VALID, SEGMENTS = {"sink_logits": draw_sinks}, {"valid": draw_valid}, {"segments": draw_segments}
SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 64, "small": True}
SLIDING = Mask(window=200, sinks=5)

CASES: tuple[Case, ...] = (
    case("small", 130, **SMALL),
    case("small_full", 70, **{**SMALL, "head_dim": 192, "value_dim": 128}, mask=FULL),
    case(
        "small_everything",
        150,
        batch=2,
        **SMALL,
        mask=Mask(window=20, sinks=3),
        softcap=10.0,
        scale=0.2,
        draw=SINKS | VALID | SEGMENTS,
    ),
    # Enough tiles that thread blocks get several; a length that is no multiple of a block.
    *(case(f"{name}_causal", 1900, heads=24, kv_heads=8, **widths) for name, widths in WIDTHS.items()),
    *(case(f"{name}_full", 1111, heads=24, kv_heads=8, **widths, mask=FULL) for name, widths in WIDTHS.items()),
    *(case(f"{name}_fp16", 1024, dtype="float16", **widths) for name, widths in WIDTHS.items()),
    *(
        case(f"{name}_everything", 1500, batch=2, **widths, mask=SLIDING, softcap=20.0, draw=SINKS | VALID | SEGMENTS)
        for name, widths in WIDTHS.items()
    ),
    *(case(f"length{length}", length, batch=2) for length in (1, 63, 64, 65, 128, 129, 257)),
    case("batch", 640, batch=40, heads=4),
    case("every_query_head_one_key", 1000, kv_heads=1),
    case("window", 3000, heads=16, mask=Mask(window=500)),
    case("window_one", 600, mask=Mask(window=1)),
    case("window_full", 1000, mask=Mask(causal=False, window=300)),
    case("sinks", 3000, heads=16, mask=Mask(window=300, sinks=200)),
    case("softcap", 1000, softcap=15.0),
    case("negative_scale", 500, scale=-0.1),
    case("sink_logits", 1000, draw=SINKS),
    case("valid", 1200, batch=3, draw=VALID),
    case("valid_full", 1200, batch=3, mask=FULL, draw=VALID),
    case("no_keys", 300, batch=2, draw={"valid": draw_no_keys}),
    case("segments", 2500, batch=2, draw=SEGMENTS),
    case("segments_valid_full", 900, batch=2, mask=FULL, draw=SEGMENTS | VALID),
)


def pairs(length, mask):
    """Pairs of query and key that see each other."""
    at = np.arange(length, dtype=np.float64)
    stop = at + 1 if mask.causal else np.full(length, length)
    start = np.maximum(at - mask.window + 1, 0) if mask.window is not None else 0
    return float(np.sum(stop - start))


def cudnn(q, k, v, *, mask, **_):
    """Attention by cuDNN, the fastest that XLA has; values as wide as keys only."""
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=mask.causal, local_window_size=window, implementation="cudnn"
    )


def shape(name, length, *, heads=32, kv_heads=None, head_dim=128, value_dim=None, mask=Mask(), valid=False):  # noqa: B008
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    widths = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))

    def make(rng):
        made = [timing.random((1, length, *width), seed=int(rng.integers(2**31))) for width in widths]
        return tuple(made), {"mask": mask} | ({"valid": jnp.ones((1, length), bool)} if valid else {})

    numbers = heads * head_dim + kv_heads * (head_dim + value_dim) + heads * value_dim
    return Shape(
        op=OP,
        name=name,
        make=make,
        site=site(heads, kv_heads, head_dim, value_dim, mask=mask),
        bytes=2.0 * length * numbers,
        flops=2.0 * heads * (head_dim + value_dim) * pairs(length, mask),
        peers={"cudnn": cudnn} if head_dim == value_dim else {},
    )


SHAPES: tuple[Shape, ...] = (
    shape("causal_8k", 8192),
    shape("causal_32k", 32768),
    shape("full_8k", 8192, mask=FULL),
    shape("causal_8k_valid", 8192, valid=True),
    shape("causal_8k_gqa", 8192, kv_heads=8),
    shape("causal_8k_hd64", 8192, heads=32, head_dim=64),
    shape("causal_8k_hd256", 8192, heads=16, head_dim=256),
    shape("causal_8k_mla", 8192, heads=32, head_dim=192, value_dim=128),
    shape("window1024_32k", 32768, mask=Mask(window=1024)),
)
