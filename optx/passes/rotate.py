"""The residual stream and the values of heads rotated, folded into the weights around them in float64."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir, tensor
from optx.errors import PassError
from optx.hadamard import Rotation
from optx.nn.attention import Attention, FusedAttention
from optx.nn.core import MLP, FusedGatedMLP, GatedMLP, JoinedGatedMLP, Linear, RMSNorm
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
from optx.nn.rotated import Orthogonal, RotatedBlock
from optx.nn.selecting import BlockMeans, Follower
from optx.nn.ssm import Mamba2
from optx.nn.token_router import BlockRouter, TokenRouter
from optx.registry import Axis, Noted, PassOptions, Site, Skipped, Stage, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate(PassOptions):
    seed: int | None = 0  # of the signs (and of `mixed`); None: a plain Hadamard matrix
    mixed: bool = (
        True  # what is left of D beside its power of two is mixed too, by a random rotation; False: block-diagonal
    )
    stream: bool = True  # the residual stream (R1)
    values: bool = True  # the values of each head (R2)
    matrices: str | None = None  # .npz of `optx rotate`: rotations that were learned; None: those of the seed

    @property
    def turns_stream(self):
        return self.stream

    def rotation(self, d: int) -> Rotation:
        return Rotation(d=d, seed=self.seed, mixed=self.mixed and self.seed is not None)

    def turn(self, name: str, d: int, where: str) -> "Rotation | Given":
        """The rotation of d numbers called `name`. Raises PassError for a file that has none such."""
        return self.rotation(d) if self.matrices is None else Given(matrix=_given(self.matrices, name, d, where))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """An orthogonal matrix that folds as a `Rotation` does."""

    matrix: np.ndarray  # float64[D, D]

    def fold(self, w: np.ndarray, axis: int) -> np.ndarray:
        """w Q along the last axis, Q^T w along the one before."""
        return np.moveaxis(np.moveaxis(np.asarray(w, np.float64), axis, -1) @ self.matrix, -1, axis)


def _given(path: str, name: str, d: int, where: str) -> np.ndarray:
    try:
        with np.load(path) as file:
            found = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise PassError(f"rotate at {where}: matrices {path}: {error}; write them with 'optx rotate'") from None
    q = found.get(name)
    if q is None or q.shape != (d, d):
        got = "not there" if q is None else f"float[{q.shape}]"
        raise PassError(
            f"rotate at {where}: {path} needs {name!r} of {d} x {d}, which is {got}; learn it for this model"
        )
    if not np.allclose(q @ q.T, np.eye(d), atol=1e-6):
        raise PassError(f"rotate at {where}: {name!r} of {path} is not orthogonal, so the model would change")
    return q


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ports:
    """Where a part meets the stream: paths of modules whose `weight` reads it or writes it, and of parts that do."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


PORTS: Mapping[type[nnx.Module], Ports] = {
    Attention: Ports(reads=("q", "k", "v"), writes=("o",), inside=("select",)),
    FusedAttention: Ports(reads=("qkv",), writes=("o",), inside=("select",)),
    BlockMeans: Ports(),
    Follower: Ports(),
    KeyIndexer: Ports(),
    NSA: Ports(reads=("gate",)),
    TokenRouter: Ports(reads=("router",)),
    BlockRouter: Ports(reads=("router",)),
    MLA: Ports(reads=("q", "q_a", "kv_a"), writes=("o",), inside=("indexer",)),
    GroupedMLA: Ports(reads=("q", "kv_a"), writes=("o",), inside=("key_norm",)),
    InverseRMS: Ports(reads=("keys",)),
    Indexer: Ports(reads=("", "k")),
    Mamba1: Ports(reads=("in_proj",), writes=("out",)),
    Mamba2: Ports(reads=("in_proj",), writes=("out",)),
    GatedDelta: Ports(reads=("qkvz", "ba"), writes=("out",)),
    LinearAttention: Ports(reads=("qkv", "gate"), writes=("out",)),
    MLP: Ports(reads=("up",), writes=("down",)),
    GatedMLP: Ports(reads=("gate", "up"), writes=("down",)),
    FusedGatedMLP: Ports(reads=("gate_up",), writes=("down",)),
    JoinedGatedMLP: Ports(reads=("gate_up",), writes=("down",)),
    MoE: Ports(reads=("router", "shared_gate"), inside=("experts", "shared")),
    Experts: Ports(reads=("gate_up", "up"), writes=("down",)),
    LatentExperts: Ports(reads=("enter",), writes=("leave",)),
}
GATED = "values are not rotated: a gate multiplies each number of a head"
Turn = Callable[[np.ndarray], np.ndarray]  # x -> x R of the last axis, float64
WEIGHTED = (Linear, GroupedLinear, Router, Indexer)


@register("rotate", axis=Axis.BITS, stage=Stage.FOLD, options=Rotate, exact=True)
def rotate(site: Site, block: Block, opt: Rotate) -> Block | Skipped | Noted:
    """Stream x -> x Q: W_in -> Q^T diag(g) W_in with the norm's gain g folded in, W_out -> W_out Q; and the values of each head
    v -> v R, o -> R^T o. Exact, and weights and activations lose their outliers, so that they round better.

    QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406), R1 and R2. The stream is
    turned where it enters the first layer and back where it leaves the last, D log D operations a token, so the embedding, the
    last norm and the head stay as they are: tied tables stay tied. With `matrices` Q and R are what
    optx.learn_rotation found for the recipe's rounding; the ends of the stream are then D x D products.
    """
    if site.layer is None:
        return Skipped("outside the layers that the stream runs through")
    if reason := unrotatable(block, opt):
        raise PassError(f"rotate at {site.path}: {reason}")
    out = ir.shallow(block)
    if opt.stream:
        turn = None if ir.is_abstract(block) else opt.turn("stream", _width(block), site.path)
        _turn_stream(out, turn, site.path)
        first, last = site.layer == 0, site.layer == site.layers - 1
        if first or last:
            end = _end(opt, turn, _width(block))
            out = RotatedBlock(out, enters=end if first else None, leaves=end if last else None)
    left = _turn_values(out, opt, site.path) if opt.values else None
    return Noted(out, left) if left else out


def unrotatable(block: Block, opt: Rotate) -> str | None:
    """Why the stream cannot run rotated through a block, or None."""
    if isinstance(block, RotatedBlock):
        return "the stream is rotated already"
    if not opt.stream:
        return None
    if block.post_norm is not None or block.post_mlp_norm is not None:
        return "a norm stands between what a part writes and the stream, and its gain does not commute with a rotation"
    if block.norm is not None and block.norm is block.mlp_norm:
        return "one norm serves mixer and mlp"
    for name, part, residual in (("norm", block.mixer, block.residual), ("mlp_norm", block.mlp, block.mlp_residual)):
        norm = getattr(block, name)
        if part is None:
            continue
        if type(norm) is not RMSNorm:
            return f"{name} is {type(norm).__name__}; an RMSNorm alone gives the same length after a rotation"
        if residual is not None and residual.normed:
            return "the stream goes on from the norm, whose gain does not commute with a rotation"
        if reason := next((said for _, _, said in ports(part) if said), None):
            return reason
    return None


def ports(part: nnx.Module, path: str = "") -> Iterator[tuple[str, str, str | None]]:
    """(path of what holds a weight, "read" or "write", why it cannot be folded into) of all that meet the stream."""
    known = PORTS.get(type(part))
    if known is None:
        yield path, "", f"{type(part).__name__} is not known to read the stream by projections alone"
        return
    for kind, names in (("read", known.reads), ("write", known.writes)):
        for name in names:
            where = f"{path}/{name}".strip("/")
            module = ir.get(part, name)
            if module is not None:
                bad = None if isinstance(module, WEIGHTED) else f"{where} is {type(module).__name__}, not a projection"
                yield where, kind, bad
    for name in known.inside:
        inner = ir.get(part, name)
        if inner is not None:
            yield from ports(inner, f"{path}/{name}".strip("/"))


def _end(opt: Rotate, turn: Rotation | Given | None, d: int) -> Rotation | Orthogonal:
    """What turns the stream where it enters and leaves."""
    if opt.matrices is None:
        return opt.rotation(d)
    return Orthogonal(
        jax.ShapeDtypeStruct((d, d), jnp.float32) if turn is None else jnp.asarray(turn.matrix, jnp.float32)
    )


def _width(block: Block) -> int:
    norm = block.norm if block.mixer is not None else block.mlp_norm
    return norm.weight.get_value().shape[0]


def _turn_stream(block: Block, rotation: Rotation | Given | None, where: str) -> None:
    """Folds norms and the rotation (None: of shapes) into a copy of a block, in place."""
    for norm_name, name in (("norm", "mixer"), ("mlp_norm", "mlp")):
        part, norm = getattr(block, name), getattr(block, norm_name)
        if part is None:
            continue
        weight = norm.weight.get_value()
        gain = None if isinstance(weight, jax.ShapeDtypeStruct) else norm.offset + np.asarray(weight, np.float64)

        def read(w, gain=gain):
            return rotation.fold(w * gain[:, None], -2)

        for path, kind, _ in ports(part):
            full = f"{name}/{path}".rstrip("/")
            module = ir.get(block, full)
            if kind == "read":
                new = ir.replace(module, weight=folded(module.weight, read, f"{where}/{full}"))
            else:
                new = _written(module, lambda w: rotation.fold(w, -1), f"{where}/{full}")
            ir.put(block, full, new)
        ones = tensor.lift(lambda w, norm=norm: jnp.full_like(w, 1 - norm.offset), weight)
        setattr(block, norm_name, ir.replace(norm, weight=ones))


def _written(module: nnx.Module, turn: Callable, where: str) -> nnx.Module:
    changes = {"weight": folded(module.weight, turn, where)}
    if module.bias is not None:
        changes["bias"] = folded(module.bias, turn, where)
    return ir.replace(module, **changes)


def folded(variable: nnx.Variable, turn: Callable, where: str):
    """turn(float64 weight) in the weight's dtype; of a shape, the shape. Raises PassError, naming the site, for numbers that are
    none."""
    weight = tensor.lift(tensor.dense, variable.get_value())
    if isinstance(weight, jax.ShapeDtypeStruct):
        return weight
    wide = np.asarray(weight, np.float64)
    if not np.isfinite(wide).all():
        raise PassError(f"rotation at {where}: the weight holds NaN or Inf; look at the checkpoint")
    return jnp.asarray(turn(wide), weight.dtype)


def _turn_values(block: Block, opt: Rotate, where: str) -> str | None:
    """Folds a rotation of each head's values into a copy of a block, in place -> why not, or None."""
    way = VALUES.get(type(block.mixer))
    changes = way(block.mixer, opt, f"{where}/mixer") if way else {}
    if isinstance(changes, str):
        return changes
    if changes:
        block.mixer = ir.replace(block.mixer, **changes)
    return None


def _of_values(opt: Rotate, part: nnx.Module, d: int, where: str) -> Rotation | Given | None:
    """Of the layer whose values the part reads; None where there are shapes alone."""
    layer = where.split("/")[1] if part.cache.share is None else part.cache.share
    return None if ir.is_abstract(part) else opt.turn(f"values/{layer}", d, where)


def _attention_values(attn: Attention, opt: Rotate, where: str) -> dict[str, nnx.Module] | str:
    if attn.gate is not None:
        return GATED
    return turned_values(attn, _turn(_of_values(opt, attn, attn.head_dim, where)), where)


def turned_values(attn: Attention, turn: Turn, where: str) -> dict[str, nnx.Module]:
    """v and o of an attention without gates, each head's values v being v R, and R^T in o."""
    changes = {"o": _read_by_head(attn.o, attn.head_dim, turn, f"{where}/o")}
    if attn.v is not None:
        changes["v"] = _written(attn.v, lambda w: _by_head(w, attn.head_dim, turn), f"{where}/v")
    return changes


def _turn(rotation: Rotation | Given | None) -> Turn:
    return lambda w: rotation.fold(w, -1)


def _latent_values(mla: MLA, opt: Rotate, where: str) -> dict[str, nnx.Module]:
    turn = _turn(_of_values(opt, mla, mla.value_dim, where))

    def values(w):
        heads = w.reshape(mla.rank, mla.heads, -1)
        keys, values = heads[..., : mla.nope_dim], heads[..., mla.nope_dim :]
        return np.concatenate([keys, turn(values)], axis=-1).reshape(w.shape)

    return {
        "o": _read_by_head(mla.o, mla.value_dim, turn, f"{where}/o"),
        "kv_b": _written(mla.kv_b, values, f"{where}/kv_b"),
    }


VALUES: Mapping[type[nnx.Module], Callable] = {Attention: _attention_values, MLA: _latent_values}


def _read_by_head(linear: Linear, head_dim: int, turn: Turn, where: str) -> Linear:
    return ir.replace(linear, weight=folded(linear.weight, lambda w: _by_head(w.T, head_dim, turn).T, where))


def _by_head(w: np.ndarray, head_dim: int, turn: Turn) -> np.ndarray:
    """w [..., N H] with each head's numbers turned."""
    return turn(w.reshape(*w.shape[:-1], -1, head_dim)).reshape(w.shape)
