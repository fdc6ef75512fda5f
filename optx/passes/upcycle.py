"""Dense MLPs turned into mixtures of experts: their neurons in groups of which a token takes the few that it needs, or copies."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from optx import ir, tensor
from optx.errors import PassError
from optx.ir import replace
from optx.nn.core import ACTIVATIONS, MLP, FusedGatedMLP, GatedMLP, JoinedGatedMLP, Linear
from optx.nn.moe import Experts, Glu, MoE, Router
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register

TOKENS = 8192  # of calibration text that neurons are grouped on: the energies of all neurons are held at once
ROUNDS = 16  # of grouping; most layers stand still after ten
DAMP = 1e-3  # of the inputs' mean square, added to their Gram matrix
SPREAD = 0.02  # standard deviation of the router of copies (arXiv:2212.05055, section 3)
Dense = GatedMLP | JoinedGatedMLP | MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(PassOptions):
    experts: int  # equal parts that hidden neurons are dealt into, shared ones among them; with copy: copies
    top_k: int  # experts that the router chooses a token, beside shared ones
    how: Literal["split", "copy"] = "split"  # split: fewer weights read a token; copy: more weights to train
    shared: int = 0  # split: parts that every token takes, of the neurons with the most energy
    # split: neurons that the same tokens need stand together; random: any, to compare with.
    groups: Literal["activations", "random"] = "activations"
    noise: float = 0.0  # copy: standard deviation of what is added to a weight, relative to that of the weights
    seed: int = 0  # of noise, of a copy's router, of random groups

    @property
    def needs(self):
        return frozenset({"inputs"}) if self.how == "split" else frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The projections of an MLP; gate None: it has none."""

    gate: Linear | None
    up: Linear
    down: Linear
    activation: str

    @classmethod
    def of(cls, mlp: Dense) -> "Parts":
        if isinstance(mlp, JoinedGatedMLP):
            gate, up = mlp.gate_up.split([mlp.gate_up.weight.get_value().shape[1] // 2] * 2)
            return cls(gate=gate, up=up, down=mlp.down, activation=mlp.activation)
        return cls(gate=getattr(mlp, "gate", None), up=mlp.up, down=mlp.down, activation=mlp.activation)

    @property
    def wide(self) -> list[Linear]:
        return [self.up] if self.gate is None else [self.gate, self.up]

    @property
    def biased(self) -> bool:
        return any(part.bias is not None for part in (*self.wide, self.down))

    def neurons(self, x: jax.Array) -> jax.Array:
        """x [T, D] -> what enters `down`, [T, F]."""
        up = self.up(x)
        return (
            ACTIVATIONS[self.activation](up) if self.gate is None else ACTIVATIONS[self.activation](self.gate(x)) * up
        )


@register("upcycle", axis=Axis.WEIGHTS, stage=Stage.STRUCTURE, options=Upcycle, exact=False, needs_healing=True)
def upcycle(site: Site, mlp: Dense, opt: Upcycle) -> MoE | Skipped:
    """down(act(gate x) * up x) as experts e that each hold some neurons j: y = shared(x) + sum over the chosen e of y_e.

    split: neurons are dealt into `experts` equal groups so that, summed over tokens, the `top_k` groups with the most energy
    h_j(x)^2 |W_down,j|^2 hold as much of it as can be (MoEfication, arXiv:2110.01786, groups neurons by their weights; LLaMA-MoE,
    arXiv:2406.16554; CMoE, arXiv:2502.04416, by activations and with a shared expert of the most active ones). The router is the
    ridge regression of sqrt(energy of e) on x. Chosen experts weigh 1, so that all of them together are the dense MLP.
    copy: each expert is the whole MLP plus noise, chosen by a random router whose weights sum to 1 (sparse upcycling,
    arXiv:2212.05055): without noise the start is the dense model. Either router has a selection bias, 0 at the start, which
    keeps loads even while healing.

    Skips shared experts of a MoE. Raises PassError for widths that do not divide, and for packed weights.
    """
    if site.path.rsplit("/", 1)[-1] != "mlp":
        return Skipped("runs for every token beside the experts of a MoE")
    if isinstance(mlp, FusedGatedMLP):
        return Skipped("gate and up are one projection; list fuse_projections in the same recipe, which runs later")
    parts = Parts.of(mlp)
    _check(site, parts, opt)
    new = _shapes(parts, opt)
    if ir.is_abstract(mlp):
        return new
    if opt.how == "copy":
        return _copied(new, parts, opt, np.random.default_rng([opt.seed, site.layer or 0]))
    return _split(new, parts, opt, site, np.random.default_rng([opt.seed, site.layer or 0]))


def _check(site: Site, parts: Parts, opt: Upcycle) -> None:
    where, f = f"upcycle at {site.path}", parts.down.weight.get_value().shape[0]
    for part in (*parts.wide, parts.down):
        if type(part) is not Linear or tensor.is_packed(part.weight.get_value()):
            raise PassError(f"{where}: wants dense weights; load with weights='dense', and round them after it")
    if opt.how == "copy" and opt.shared:
        raise PassError(
            f"{where}: shared {opt.shared}; allowed with copy: 0, a copy that all tokens take is the dense MLP"
        )
    if opt.how == "split" and opt.noise:
        raise PassError(f"{where}: noise {opt.noise:g}; allowed with split: 0, its experts differ")
    if not 0 <= opt.shared < opt.experts or not 1 <= opt.top_k <= opt.experts - opt.shared:
        raise PassError(
            f"{where}: top_k {opt.top_k} of {opt.experts} experts, {opt.shared} of them shared; allowed: 1 to experts - shared"
        )
    if opt.how == "split" and f % opt.experts:
        near = [n for n in range(2, f + 1) if f % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - opt.experts))[:4])
        raise PassError(
            f"{where}: {f} hidden neurons do not divide into {opt.experts} experts; allowed: divisors, as {near}"
        )


def _shapes(parts: Parts, opt: Upcycle) -> MoE:
    """What comes out, abstract."""
    (d, f), dtype, split = parts.up.weight.get_value().shape, parts.up.weight.get_value().dtype, opt.how == "split"
    count, width = opt.experts - opt.shared, f // opt.experts if split else f
    dtype = jnp.dtype(dtype).name
    router = Router(
        d, count, top_k=opt.top_k, score="sigmoid" if split else "softmax", normalized=not split, bias=split,
        selection_bias=True, gain=split,
    )  # fmt: skip
    glu, gated = Glu(activation=parts.activation), parts.gate is not None
    experts = Experts(count, d, width, glu=glu, gated=gated, bias=parts.biased, dtype=dtype)
    kind, shared = GatedMLP if gated else MLP, None
    if opt.shared:
        shared = kind(d, opt.shared * width, activation=parts.activation, bias=parts.biased, dtype=dtype)
        shared.down = replace(shared.down, bias=None)  # the experts hold it
    return MoE(router, experts, shared=shared)


def _copied(new: MoE, parts: Parts, opt: Upcycle, rng: np.random.Generator) -> MoE:
    (d, f), count = parts.up.weight.get_value().shape, opt.experts
    weight = SPREAD * rng.standard_normal((d, count), np.float32)
    router = replace(new.router, weight=jnp.asarray(weight), selection_bias=jnp.zeros(count))
    experts = _experts(new.experts, parts, np.tile(np.arange(f), (count, 1)), 1.0)
    for name in ("gate_up", "up", "down") if opt.noise else ():
        if (part := getattr(experts, name)) is not None:
            w = part.weight.get_value()
            drawn = jnp.asarray(rng.standard_normal(w.shape, np.float32)) * opt.noise * jnp.std(w.astype(jnp.float32))
            experts = replace(experts, **{name: replace(part, weight=(w + drawn).astype(w.dtype))})
    return replace(new, router=router, experts=experts)


def _inputs(site: Site) -> jax.Array:
    """[T, D] of the site's calibration text, tokens left out evenly."""
    calls = getattr(site.seen, "inputs", ())
    if not calls:
        raise PassError(f"upcycle at {site.path}: no statistics of its inputs; compile with calibration text")
    x = jnp.concatenate([x for x, *_ in calls])
    return x[:: -(-len(x) // TOKENS)]


def _split(new: MoE, parts: Parts, opt: Upcycle, site: Site, rng: np.random.Generator) -> MoE:
    x = _inputs(site)
    norms = jnp.sum(jnp.square(parts.down.weight.get_value().astype(jnp.float32)), axis=1)
    energy = np.asarray(jnp.square(parts.neurons(x).astype(jnp.float32)) * norms)  # [T, F]
    if not np.isfinite(energy).all():
        raise PassError(f"upcycle at {site.path}: NaN or Inf in its neurons; look at the weights before it")
    f, random = energy.shape[1], opt.groups == "random"
    first = rng.permutation(f) if random else np.argsort(-energy.mean(0), kind="stable")
    always, rest = np.sort(first[: f // opt.experts * opt.shared]), np.sort(first[f // opt.experts * opt.shared :])
    count = opt.experts - opt.shared
    start = rng.permutation(len(rest)) % count
    owners = start if random else grouped(energy[:, rest], start, opt.top_k)
    order = np.stack([rest[owners == e] for e in range(count)])
    weight, bias = predictor(np.asarray(x, np.float64), np.sqrt(energy[:, order].sum(-1)))
    router = replace(
        new.router, weight=jnp.asarray(weight, jnp.float32), bias=jnp.asarray(bias, jnp.float32),
        selection_bias=jnp.zeros(count), gain=jnp.zeros(count),
    )  # fmt: skip
    experts = _experts(new.experts, parts, order, 1 / opt.top_k)
    shared = None if new.shared is None else _shared(new.shared, parts, always)
    return replace(new, router=router, experts=experts, shared=shared)


def grouped(energy: np.ndarray, owners: np.ndarray, top_k: int) -> np.ndarray:
    """energy [T, F], int[F] a first equal grouping -> int[F], one whose `top_k` best groups a token hold more energy.

    Each round gives every token its best groups, then every neuron to the group whose tokens give it the most, groups kept
    equal (a k-means whose centres are sets of tokens); the best round wins.
    """
    count, total, best = owners.max() + 1, max(energy.sum(), np.finfo(np.float64).tiny), (-1.0, owners)
    for _ in range(ROUNDS):
        held = energy @ np.eye(count, dtype=energy.dtype)[owners]
        chosen = np.argpartition(-held, top_k - 1, axis=1)[:, :top_k]
        takes = np.zeros_like(held)
        np.put_along_axis(takes, chosen, 1, axis=1)
        best = max(best, (float((held * takes).sum() / total), owners), key=lambda one: one[0])
        owners = balanced(energy.T @ takes, len(owners) // count)
    return best[1]


def balanced(gain: np.ndarray, size: int) -> np.ndarray:
    """gain [F, E] -> int[F], every item in one of E groups of `size`; those with the most to lose choose first."""
    owners, room = np.full(len(gain), -1), np.full(gain.shape[1], size)
    while (free := np.flatnonzero(owners < 0)).size:
        open_ = np.where(room > 0, gain[free], -np.inf)
        ranked = np.sort(open_, axis=1)
        regret = ranked[:, -1] - (ranked[:, -2] if gain.shape[1] > 1 else 0)
        order, best = np.argsort(-regret, kind="stable"), open_.argmax(1)
        for e in np.flatnonzero(room):
            taken = free[order[best[order] == e]][: room[e]]
            owners[taken], room[e] = e, room[e] - len(taken)
    return owners


def predictor(x: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of `wanted` [T, E] on x [T, D] -> (weight [D, E], bias [E]), in units of the spread of `wanted`."""
    centre, mean, spread = x.mean(0), wanted.mean(), max(wanted.std(), np.finfo(np.float64).tiny)
    x, target = x - centre, (wanted - mean) / spread
    gram = x.T @ x
    damp = DAMP * max(np.trace(gram) / len(gram), np.finfo(np.float64).tiny)
    weight = np.linalg.solve(gram + damp * np.eye(len(gram)), x.T @ (target - target.mean(0)))
    return weight, target.mean(0) - centre @ weight


def _experts(new: Experts, parts: Parts, order: np.ndarray, share: float) -> Experts:
    """Neurons order[e] of the MLP in each expert e; share: of the output's bias that a chosen expert adds."""
    wide = [jnp.moveaxis(part.weight.get_value()[:, order], 1, 0) for part in parts.wide]  # [E, D, F]
    bias = [jnp.take(_bias(part), order) for part in parts.wide]
    name = "up" if parts.gate is None else "gate_up"
    out = jnp.tile(_bias(parts.down) * share, (len(order), 1))
    first = _filled(getattr(new, name), jnp.concatenate(wide, axis=-1), jnp.concatenate(bias, axis=-1))
    return replace(new, **{name: first, "down": _filled(new.down, parts.down.weight.get_value()[order], out)})


def _shared(new: GatedMLP | MLP, parts: Parts, order: np.ndarray) -> GatedMLP | MLP:
    names = ("up",) if parts.gate is None else ("gate", "up")
    made = {
        name: _filled(getattr(new, name), part.weight.get_value()[:, order], _bias(part)[order])
        for name, part in zip(names, parts.wide, strict=True)
    }
    return replace(new, **made, down=_filled(new.down, parts.down.weight.get_value()[order], None))


def _filled(new, weight, bias):
    """The abstract projection with numbers; a bias where it has one."""
    return replace(new, weight=weight, **({} if new.bias is None else {"bias": bias.astype(weight.dtype)}))


def _bias(linear: Linear) -> jax.Array:
    return jnp.zeros(linear.weight.get_value().shape[1]) if linear.bias is None else linear.bias.get_value()
