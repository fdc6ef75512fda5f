"""Rotations that run with the model: of queries and keys after their positions, and of what goes into projections."""

import dataclasses
from collections.abc import Callable, Mapping

from flax import nnx

from optx import ir
from optx.errors import PassError
from optx.hadamard import Rotation
from optx.ir import replace
from optx.nn.attention import Attention
from optx.nn.core import MLP, GatedMLP, JoinedGatedMLP
from optx.nn.decoder import Block
from optx.nn.moe import Experts
from optx.nn.rotated import Rotated, RotatedHeads, RotatedNorm
from optx.passes.rotate import folded, ports
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

Part = Block | Attention | GatedMLP | JoinedGatedMLP | MLP | Experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateOnline(PassOptions):
    size: int | None = None  # numbers of a block that is rotated, a power of two; None: all of the axis
    seed: int | None = 0  # of the signs; None: a plain Hadamard matrix
    keys: bool = True  # queries and keys after their positions (R3)
    down: bool = True  # what goes into the down projections (R4)
    inputs: bool = False  # what norms give to mixers and mlps

    def rotation(self, d: int, where: str) -> Rotation:
        """Raises PassError where d numbers have no such rotation."""
        size = self.size
        if size is not None and (size < 2 or size & (size - 1) or d % size):
            raise PassError(
                f"rotate_online at {where}, {d} numbers: size {size}; allowed: a power of two that divides {d}"
            )
        return Rotation(d=d, size=size, seed=self.seed, mixed=size is None and self.seed is not None)


@register("rotate_online", axis=Axis.BITS, stage=Stage.FOLD, options=RotateOnline, exact=True)
def rotate_online(site: Site, part: Part, opt: RotateOnline) -> nnx.Module | Skipped:
    """q' = q H, k' = k H after their positions, as q H . k H = q . k, so that keys are cached without outlier channels; and
    x W = (x H) (H^T W) with H^T W stored, so that what is multiplied there rounds better.

    QuaRot (Ashkboos et al. 2024, arXiv:2404.00456); R3 and R4 of SpinQuant (Liu et al. 2024, arXiv:2405.16406); in blocks of a
    format's group as MR-GPTQ (arXiv:2509.23202). `inputs` does for q, k, v, gate and up what a rotated stream does, and takes
    the norm's gain along: the noise of rounded weights then meets no channel that the gain would have muted, and post norms do
    not stand in the way. D log D operations a token and rotation.
    """
    return next(way for kind, way in WAYS.items() if isinstance(part, kind))(site, part, opt)


def _keys(site: Site, attn: Attention, opt: RotateOnline) -> Attention | Skipped:
    if not opt.keys:
        return Skipped("keys: false")
    if attn.rope is not None and attn.rope.rotation is not None:
        raise PassError(f"rotate_online at {site.path}: queries and keys are rotated already")
    return replace(attn, rope=RotatedHeads(rope=attn.rope, rotation=opt.rotation(attn.head_dim, site.path)))


def _down(site: Site, part: GatedMLP | JoinedGatedMLP | MLP | Experts, opt: RotateOnline) -> nnx.Module | Skipped:
    if not opt.down:
        return Skipped("down: false")
    down, where = part.down, f"{site.path}/down"
    if isinstance(down, Rotated):
        raise PassError(f"rotate_online at {where}: its input is rotated already")
    rotation = opt.rotation(down.weight.get_value().shape[-2], where)
    weight = folded(down.weight, lambda w: rotation.fold(w, -2), where)
    return replace(part, down=Rotated(replace(down, weight=weight), rotation))


def _inputs(site: Site, block: Block, opt: RotateOnline) -> Block | Skipped:
    if not opt.inputs:
        return Skipped("inputs: false")
    if reason := _unrotatable(block):
        return Skipped(reason)
    out = ir.shallow(block)
    for name, part_name in (("norm", "mixer"), ("mlp_norm", "mlp")):
        norm, part = getattr(block, name), getattr(block, part_name)
        if part is None:
            continue
        rotation = opt.rotation(norm.weight.get_value().shape[0], f"{site.path}/{name}")
        for path in [path for path, kind, _ in ports(part) if kind == "read"]:
            full = f"{part_name}/{path}".rstrip("/")
            module = ir.get(out, full)
            weight = folded(module.weight, lambda w, r=rotation: r.fold(w, -2), f"{site.path}/{full}")
            ir.put(out, full, replace(module, weight=weight))
        setattr(out, name, RotatedNorm(norm, rotation))
    return out


def _unrotatable(block: Block) -> str | None:
    """Why what the norms of a block give cannot be rotated, or None."""
    if isinstance(block.norm, RotatedNorm) or isinstance(block.mlp_norm, RotatedNorm):
        return "norms are rotated already"
    if block.norm is not None and block.norm is block.mlp_norm:
        return "one norm serves mixer and mlp"
    if any(residual is not None and residual.normed for residual in (block.residual, block.mlp_residual)):
        return "the stream goes on from the norm"
    parts = [part for part in (block.mixer, block.mlp) if part is not None]
    return next((said for part in parts for _, kind, said in ports(part) if said and kind != "write"), None)


WAYS: Mapping[type, Callable] = {
    Block: _inputs,
    Attention: _keys,
    GatedMLP: _down,
    JoinedGatedMLP: _down,
    MLP: _down,
    Experts: _down,
}
