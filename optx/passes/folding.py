"""Where in a block a scale a channel can move from one weight into the next without changing what the block computes.

(norm(x) / s) (s W) = norm(x) W        norm.weight / s, and the rows of everything that reads the norm times s
(act(g) * (u / s)) (s W_down)          outputs of up / s, rows of down times s
(p (v / s)) (s W_o)                    outputs of v / s, rows of o times s, for all query heads that read a kv head
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from optx import ir, tensor
from optx.errors import PassError
from optx.ir import replace
from optx.nn.attention import Attention, FusedAttention
from optx.nn.core import MLP, FusedGatedMLP, GatedMLP, JoinedGatedMLP, LayerNorm, Linear, RMSNorm
from optx.nn.decoder import Block
from optx.nn.delta import GatedDelta
from optx.nn.dsa import KeyIndexer
from optx.nn.grouped_mla import GroupedMLA, InverseRMS
from optx.nn.indexer import Indexer
from optx.nn.linear_attention import LinearAttention
from optx.nn.mamba1 import Mamba1
from optx.nn.mla import MLA
from optx.nn.moe import Experts, GroupedLinear, LatentExperts, MoE, Router
from optx.nn.nsa import NSA
from optx.nn.rotated import Rotated
from optx.nn.selecting import BlockMeans, Follower
from optx.nn.ssm import Mamba2
from optx.nn.token_router import BlockRouter, TokenRouter
from optx.registry import PassOptions, Seen

# What of a part reads its input: children by name, '' for its own `weight` [..., D, F]; an absent child reads nothing.
READERS: Mapping[type, tuple[str, ...]] = {
    Linear: ("",),
    GroupedLinear: ("",),
    Router: ("",),
    Indexer: ("", "k"),
    Attention: ("q", "k", "v", "select"),
    FusedAttention: ("qkv", "select"),
    BlockMeans: (),
    Follower: (),
    KeyIndexer: (),
    NSA: ("gate",),
    TokenRouter: ("router",),
    BlockRouter: ("router",),
    MLA: ("q", "q_a", "kv_a", "indexer"),
    GroupedMLA: ("q", "kv_a", "key_norm"),
    InverseRMS: ("keys",),
    LinearAttention: ("qkv", "gate"),
    GatedDelta: ("qkvz", "ba"),
    Mamba1: ("in_proj",),
    Mamba2: ("in_proj",),
    MLP: ("up",),
    GatedMLP: ("gate", "up"),
    FusedGatedMLP: ("gate_up",),
    JoinedGatedMLP: ("gate_up",),
    MoE: ("router", "experts", "shared", "shared_gate"),
    Experts: ("gate_up", "up"),
    LatentExperts: ("enter",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """One place where a scale moves. Paths are those in the block."""

    source: str  # norm or projection whose outputs are divided
    readers: tuple[str, ...]  # modules whose `weight` rows are multiplied
    part: str  # mixer or mlp, whose output tells what a scale is worth
    start: int = 0  # first output of a projection that is divided
    shared: int = 1  # query heads that read one kv head
    head: int = 1  # numbers of a head

    def __str__(self):
        return self.source

    def spread(self, s: jax.Array) -> jax.Array:
        """The source's scale [..., channels] for the channels of its readers."""
        if self.shared == 1:
            return s
        return jnp.repeat(s.reshape(-1, self.head), self.shared, axis=0).reshape(-1)

    def gather(self, x: jax.Array, join: Callable) -> jax.Array:
        """Numbers of the readers' channels for those of the source: join (max, mean) over the heads that share one."""
        return x if self.shared == 1 else join(x.reshape(-1, self.shared, self.head), axis=1).reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoothing(PassOptions):
    """Which scales are moved."""

    down: bool = True  # from up projections into down projections
    values: bool = True  # from values into output projections
    qk_norm: bool = False  # into q, k and v also where heads of q and k are normed, whose error a norm blows up


def folds(block: Block, opt) -> tuple[list[Fold], dict[str, str]]:
    """The places of a block in which `opt` (with the fields of Smoothing) wants a scale moved, and by source the reason why
    not there. Raises PassError where one of their weights is packed."""
    found, refused = [], {}
    for one in _all(block, opt):
        if isinstance(one, Fold):
            found.append(one)
        else:
            refused[one[0]] = one[1]
    for fold in found:
        for path in (fold.source, *fold.readers):
            _check_dense(path, ir.get(block, path).weight.get_value())
    return found, refused


def _all(block: Block, opt) -> Iterator[Fold | tuple[str, str]]:
    yield from _norm(block, "norm", "mixer", block.residual, opt)
    if opt.values:
        yield from _inside(block, "mixer", VALUES)
    yield from _norm(block, "mlp_norm", "mlp", block.mlp_residual, opt)
    if opt.down:
        yield from _inside(block, "mlp", DOWN)


def _norm(block, name, part, residual, opt) -> Iterator[Fold | tuple[str, str]]:
    norm, module = getattr(block, name), getattr(block, part)
    if module is None:
        return
    if type(norm) not in (RMSNorm, LayerNorm):
        yield name, f"{type(norm).__name__} cannot take a scale"
    elif block.norm is block.mlp_norm:
        yield name, "one norm serves mixer and mlp"
    elif residual is not None and residual.normed:
        yield name, "the stream goes on from norm(x)"
    elif isinstance(module, Attention) and module.q_norm is not None and not opt.qk_norm:
        yield name, "heads of q and k are normed (qk_norm: true takes it all the same)"
    else:
        readers, unknown = _readers(module, part)
        if unknown:
            yield name, f"not known what {unknown} reads"
        else:
            yield Fold(source=name, readers=tuple(readers), part=part)


def _readers(module: nnx.Module, path: str) -> tuple[list[str], str]:
    """Paths of modules whose `weight` meets the input of `module`, and the class that is not in the table, or ''."""
    kind = next((kind for kind in type(module).__mro__ if kind in READERS), None)
    if kind is None:
        return [], type(module).__name__
    found, unknown = [], ""
    for name in READERS[kind]:
        child = getattr(module, name) if name else None
        if not name:
            found.append(path)
        elif child is not None:
            more, missing = _readers(child, f"{path}/{name}")
            found, unknown = found + more, unknown or missing
    return found, unknown


def _inside(block, part, table) -> Iterator[Fold | tuple[str, str]]:
    for path, module in ir.walk(getattr(block, part), part) if getattr(block, part) is not None else ():
        if type(module) in table:
            one = table[type(module)](module, path, part)
            turned = [r for r in one.readers if isinstance(ir.get(block, r), Rotated)] if isinstance(one, Fold) else []
            one = (
                f"{', '.join(turned)}: a rotation stands before it, which no scale a channel passes" if turned else one
            )
            yield (f"{path}", one) if isinstance(one, str) else one


def _gated(module, path, part) -> Fold:
    return Fold(source=f"{path}/up", readers=(f"{path}/down",), part=part)


def _joined(module, path, part) -> Fold:
    half = module.down.weight.get_value().shape[-2]
    return Fold(source=f"{path}/gate_up", readers=(f"{path}/down",), part=part, start=half)


def _experts(module: Experts, path, part) -> Fold | str:
    if not module.gated:
        return "without a gate the activation lies between up and down"
    if module.glu.limit is not None or module.glu.shift:
        return f"up is clamped or shifted ({module.glu})"
    return _joined(module, path, part)


def _values(module: Attention, path, part) -> Fold | str:
    if module.v is None:
        return "values are those of another layer"
    if isinstance(module.select, NSA) and module.select.pool_v is not None:
        return "an MLP compresses the values"
    shared = module.heads // module.kv_heads
    return Fold(source=f"{path}/v", readers=(f"{path}/o",), part=part, shared=shared, head=module.head_dim)


DOWN: Mapping[type, Callable[..., Fold | str]] = {
    GatedMLP: _gated,
    JoinedGatedMLP: _joined,
    Experts: _experts,
    MLP: lambda *_: "without a gate the activation lies between up and down",
}
VALUES: Mapping[type, Callable[..., Fold | str]] = {Attention: _values}


# --- Moving a scale --------------------------------------------------------------------------------------------------


def move(block: Block, fold: Fold, s: jax.Array) -> Block:
    """The block with the fold's source divided by s float32[channels] ([E, channels] of experts), its readers multiplied."""
    out = ir.shallow(block)
    source = ir.get(block, fold.source)
    ir.put(out, fold.source, DIVIDED[type(source)](source, s, fold.start))
    rows = fold.spread(s)[..., None]
    for path in fold.readers:
        reader = ir.get(out, path)
        ir.put(out, path, replace(reader, weight=_times(reader.weight.get_value(), rows)))
    return out


def _times(x: jax.Array, s: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * s).astype(x.dtype)


def _check_dense(path: str, weight) -> None:
    if tensor.is_packed(weight):
        raise PassError(
            f"{path}: no scale moves into or out of a packed weight, {ir.tensor_text(weight)}; load with weights='dense'"
        )


def _divided_norm(norm: RMSNorm, s, start) -> RMSNorm:
    weight = norm.weight.get_value()
    moved = (weight.astype(jnp.float32) + norm.offset) / s - norm.offset
    return replace(norm, weight=moved.astype(weight.dtype))


def _divided_layer_norm(norm: LayerNorm, s, start) -> LayerNorm:
    bias = {} if norm.bias is None else {"bias": _times(norm.bias.get_value(), 1 / s)}
    return replace(norm, weight=_times(norm.weight.get_value(), 1 / s), **bias)


def _divided_outputs(linear: Linear | GroupedLinear, s, start):
    weight = linear.weight.get_value()
    by = jnp.ones((*s.shape[:-1], weight.shape[-1]), jnp.float32).at[..., start : start + s.shape[-1]].set(1 / s)
    bias = {} if linear.bias is None else {"bias": _times(linear.bias.get_value(), by)}
    return replace(linear, weight=_times(weight, by[..., None, :]), **bias)


DIVIDED: Mapping[type, Callable] = {
    RMSNorm: _divided_norm,
    LayerNorm: _divided_layer_norm,
    Linear: _divided_outputs,
    GroupedLinear: _divided_outputs,
}


# --- What is known of the channels -----------------------------------------------------------------------------------


def seen_of(fold: Fold, parts: Mapping[str, Seen], name: str) -> jax.Array:
    """float32 of the source's channels: the readers' `absmax`, or their mean of `absmean` over all their tokens.

    Experts that read a norm are taken together, those that read their own up projection stay apart: [E, channels].
    """
    seen = [parts[path] for path in fold.readers if path in parts]
    if not seen:
        raise PassError(f"{fold}: calibration text reaches none of {', '.join(fold.readers)}")
    if fold.source.rpartition("/")[0]:
        (one,) = seen
        return fold.gather(getattr(one, name), jnp.max if name == "absmax" else jnp.mean)
    if name == "absmax":
        return jnp.max(jnp.stack([getattr(one, name).reshape(-1, _width(one, name)).max(0) for one in seen]), axis=0)
    one = max(
        seen, key=lambda one: one.tokens.ndim == 0
    )  # all of one norm's readers see the same, experts each a share
    weight = one.tokens.reshape(-1, 1).astype(jnp.float32)
    mean = getattr(one, name).reshape(-1, _width(one, name))
    return jnp.sum(mean * weight, axis=0) / jnp.maximum(jnp.sum(weight), 1)


def _width(seen: Seen, name: str) -> int:
    return getattr(seen, name).shape[-1]


def weights_of(block: Block, fold: Fold) -> list[jax.Array]:
    """The readers' weights that are projections: [D, F], or [E, D, F] of experts."""
    readers = [(path, ir.get(block, path)) for path in fold.readers]
    return [module.weight.get_value() for path, module in readers if isinstance(module, Linear | GroupedLinear)]
