"""Fewer experts: those that add least are dropped, or those that give alike outputs are merged."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir, tensor
from optx.errors import PassError
from optx.ir import replace
from optx.nn.moe import Experts, GroupedLinear, MoE, Router, load
from optx.registry import Axis, PassOptions, Site, Skipped, Stage, register
from optx.watch import watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReduceExperts(PassOptions):
    keep: float  # experts of a layer that stay: a number from 1, or below 1 a share of them
    how: Literal["prune", "merge"] = "prune"
    # merge: neurons are matched before they are averaged; takes time with the third power of an expert's width.
    align: bool = True
    # merge, by layer: of each expert, the group that it goes into; none: by its outputs on calibration text.
    groups: tuple[tuple[int, ...], ...] | None = None

    @property
    def needs(self):
        return frozenset({"inputs"})

    @property
    def unresolved(self) -> bool:
        return self.how == "merge" and self.groups is None

    def resolved(self, model: nnx.Module, windows: Sequence[np.ndarray]) -> "ReduceExperts":
        """With `groups`, by average linkage of the experts' mean outputs (HC-SMoE, arXiv:2410.08589)."""
        seen = mean_outputs(model, windows)
        groups = {i: alike(x, self.count(f"layers/{i}/mlp", len(x))) for i, x in seen.items()}
        return dataclasses.replace(self, groups=tuple(groups.get(i, ()) for i in range(len(model.layers))))

    def count(self, where: str, experts: int) -> int:
        """Experts that stay of so many. Raises PassError for a number that does not work out."""
        whole = self.keep < 1 or self.keep == int(self.keep)
        count = int(self.keep) if self.keep >= 1 else round(self.keep * experts)
        if not whole or not 1 <= count <= experts:
            raise PassError(
                f"reduce_experts at {where}: keep {self.keep:g} of {experts} experts; allowed: a whole number from 1 to "
                f"{experts}, or a share of them below 1 that leaves one"
            )
        return count


@register("reduce_experts", axis=Axis.WEIGHTS, stage=Stage.STRUCTURE, options=ReduceExperts, exact=False)
def reduce_experts(site: Site, moe: MoE, opt: ReduceExperts) -> MoE | Skipped:
    """`keep` of E experts stay in a layer.

    prune: those with the largest mean, over the tokens routed to e, of gate_e(x) |y_e(x)| (REAP, arXiv:2510.13999); the router
    loses the columns and biases of the others, and of a router with groups each keeps equally many. merge: experts of a group
    become the mean of their weights by the tokens that each got, neurons matched to those of the busiest by a permutation
    (M-SMoE, arXiv:2310.01334); the router stays as it is, so that a token which took two of a group takes their mean with both
    weights. Shared experts are left alone.

    Raises PassError for fewer experts than a token takes, and for packed experts.
    """
    count = opt.count(site.path, moe.router.experts)
    if count == moe.router.experts:
        return Skipped(f"has {count} experts")
    if moe.merged is not None:
        raise PassError(f"reduce_experts at {site.path}: its experts are merged already; start from the checkpoint")
    where, core = next((path, part) for path, part in ir.walk(moe.experts) if isinstance(part, Experts))
    for name, part in _projections(core).items():
        if tensor.is_packed(part.weight.get_value()):
            raise PassError(f"reduce_experts at {site.path}/{name}: wants dense weights; load with weights='dense'")
    change = _pruned if opt.how == "prune" else _merged
    parts, changes = change(site, moe, core, opt, count)
    new = replace(core, experts=count, active=min(1.0, moe.router.top_k / count), **parts)
    return replace(moe, experts=replace(moe.experts, **{where: new}) if where else new, **changes)


def _pruned(site: Site, moe: MoE, core: Experts, opt: ReduceExperts, count: int):
    """(the experts' projections, what else of the MoE changes)."""
    router = moe.router
    _check_router(site, router, count)
    if ir.is_abstract(moe):
        return _in_shapes(core, count), {"router": _narrow(router, None, count)}
    kept = best(_statistics(site, moe)[1], router.groups, count)
    parts = {name: _with(part, count, lambda x: x[kept]) for name, part in _projections(core).items()}
    return parts, {"router": _narrow(router, kept, count)}


def _merged(site: Site, moe: MoE, core: Experts, opt: ReduceExperts, count: int):
    groups = _groups(site, moe, opt, count)
    if ir.is_abstract(moe):
        return _in_shapes(core, count), {"merged": groups}
    return merged(core, np.asarray(groups), _statistics(site, moe)[0], opt.align), {"merged": groups}


def too_few(router: Router, count: int) -> str | None:
    """Why a router cannot choose among `count` experts, with what is allowed."""
    if count % router.groups:
        return (
            f"{count} experts do not divide into its {router.groups} groups, of which a token looks at {router.kept}; allowed: "
            f"multiples of {router.groups}"
        )
    if router.top_k > router.kept * (count // router.groups):
        of = "" if router.groups == 1 else f" in {router.kept} of {router.groups} groups"
        least = -(-router.top_k // router.kept) * router.groups
        return f"a token takes {router.top_k} experts, and {count} stay{of}; allowed: at least {least}"
    return None


def _check_router(site: Site, router: Router, count: int) -> None:
    if reason := too_few(router, count):
        raise PassError(f"reduce_experts at {site.path}: {reason}")


def _groups(site: Site, moe: MoE, opt: ReduceExperts, count: int) -> tuple[int, ...]:
    """Of each expert the one it goes into; until a compile has measured them, neighbours."""
    experts = moe.router.experts
    if opt.groups is None:
        return tuple(e * count // experts for e in range(experts))
    found = opt.groups[site.layer] if site.layer is not None and site.layer < len(opt.groups) else ()
    if len(found) != experts or set(found) != set(range(count)):
        raise PassError(
            f"reduce_experts at {site.path}: groups {list(found)}; allowed: one of 0 to {count - 1} for each of its {experts} "
            "experts, each used; leave groups out to have them measured"
        )
    return found


def _projections(core: Experts) -> dict[str, GroupedLinear]:
    return {name: part for name in ("gate_up", "up", "down") if (part := getattr(core, name)) is not None}


def _in_shapes(core: Experts, count: int) -> dict[str, GroupedLinear]:
    cut = lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)  # noqa: E731
    return {name: _with(part, count, cut) for name, part in _projections(core).items()}


def _with(part: GroupedLinear, count: int, change) -> GroupedLinear:
    bias = {} if part.bias is None else {"bias": change(part.bias.get_value())}
    return replace(part, experts=count, weight=change(part.weight.get_value()), **bias)


def _narrow(router: Router, kept: np.ndarray | None, count: int) -> Router:
    """The router with the columns of what stays; kept None: in shapes."""
    cut = lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], count), x.dtype) if kept is None else x[..., kept]  # noqa: E731
    names = ("weight", "bias", "selection_bias", "gain")
    columns = {name: cut(part.get_value()) for name in names if (part := getattr(router, name)) is not None}
    return replace(router, experts=count, **columns)


def best(worth: np.ndarray, groups: int, count: int) -> np.ndarray:
    """Indices, ascending, of the `count` experts of most worth, equally many of each group of neighbours."""
    by_group = worth.reshape(groups, -1)
    order = np.argsort(-by_group, axis=1, kind="stable")[:, : count // groups]
    return np.sort((order + np.arange(groups)[:, None] * by_group.shape[1]).reshape(-1))


def _statistics(site: Site, moe: MoE) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, REAP's worth) of each expert on the site's calibration text, float64[E]."""
    calls = getattr(site.seen, "inputs", ())
    if not calls:
        raise PassError(f"reduce_experts at {site.path}: no statistics of its inputs; compile with calibration text")
    graph, state = nnx.split(moe)
    sums = [[np.asarray(part, np.float64) for part in _sums_of(graph)(state, x)] for x, *_ in calls]
    loads, worth = (sum(parts) for parts in zip(*sums, strict=True))
    if not np.isfinite(worth).all():
        raise PassError(f"reduce_experts at {site.path}: NaN or Inf in its outputs; look at the weights before it")
    return loads, worth / np.maximum(loads, 1)


@functools.lru_cache(maxsize=64)
def _sums_of(graph):
    def run(state, x):
        moe = nnx.merge(graph, state)
        routing = moe.router(x)
        sizes = jnp.linalg.norm(moe.experts.outputs(x, routing.experts), axis=-1) * routing.weights
        return load(routing), jnp.zeros(moe.router.experts).at[routing.experts].add(sizes)

    return jax.jit(run)


def mean_outputs(model: nnx.Module, windows: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """Layer -> float64[E, D], what each expert makes of all tokens of the text, on average."""
    paths = {f"layers/{i}/mlp": i for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoE)}
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, tokens):
        tree, found = nnx.merge(graph, state), {}

        def note(path, call, x):
            moe = ir.get(tree, path)
            one = lambda e: moe.experts.outputs(x, jnp.full((x.shape[0], 1), e, jnp.int32)).mean((0, 1))  # noqa: E731
            found[path] = jax.lax.map(one, jnp.arange(moe.router.experts))
            return call(x)

        watch(tree, list(paths), note)
        tree(tokens)
        return found

    found = [run(state, jnp.asarray(tokens)) for tokens in windows]
    return {
        layer: np.mean([np.asarray(one[path], np.float64) for one in found], axis=0) for path, layer in paths.items()
    }


def alike(features: np.ndarray, count: int) -> tuple[int, ...]:
    """features [E, D] -> the group of each expert, of `count`, by average linkage of their distances."""
    from scipy.cluster.hierarchy import cut_tree, linkage  # slow to load

    if count == len(features):
        return tuple(range(count))
    return tuple(int(g) for g in cut_tree(linkage(features, "average"), n_clusters=count)[:, 0])


def merged(core: Experts, groups: np.ndarray, loads: np.ndarray, align: bool) -> dict[str, GroupedLinear]:
    """The projections of the groups' means, experts weighted by their tokens, neurons in the order of the busiest one's."""
    parts = {name: _arrays(part) for name, part in _projections(core).items()}
    order = np.tile(np.arange(parts["down"][0].shape[1]), (len(groups), 1))
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        head = members[loads[members].argmax()]
        for e in members if align else ():
            order[e] = order[e] if e == head else _matched(parts, head, e)
    shares = (groups[None] == np.arange(groups.max() + 1)[:, None]) * (
        loads + 1e-9
    )  # groups without tokens: equal shares
    shares = shares / shares.sum(1, keepdims=True)
    found = {}
    for name, (weight, bias) in parts.items():
        if name == "down":
            weight = np.take_along_axis(weight, order[:, :, None], axis=1)
        else:
            halves = order if name == "up" else np.concatenate([order, order + order.shape[1]], axis=1)
            weight, bias = (None if x is None else _columns(x, halves) for x in (weight, bias))
        old = _projections(core)[name]
        mean = lambda x, like: jnp.asarray(np.tensordot(shares, x, 1), like.get_value().dtype)  # noqa: E731
        more = {} if bias is None else {"bias": mean(bias, old.bias)}
        found[name] = replace(old, experts=len(shares), weight=mean(weight, old.weight), **more)
    return found


def _arrays(part: GroupedLinear) -> tuple[np.ndarray, np.ndarray | None]:
    return tuple(None if v is None else np.asarray(v.get_value(), np.float32) for v in (part.weight, part.bias))


def _columns(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """x [E, ..., F] with the columns order[e] of each."""
    return np.take_along_axis(x, order.reshape(len(x), *(1,) * (x.ndim - 2), -1), axis=-1)


def _matched(parts, head: int, e: int) -> np.ndarray:
    """Neurons of expert e in the order in which they resemble those of `head` most: largest sum of inner products of weights."""
    from scipy.optimize import linear_sum_assignment  # slow to load

    down, (wide, _) = parts["down"][0], parts.get("gate_up") or parts["up"]
    alike = down[head] @ down[e].T
    for start in range(0, wide.shape[-1], down.shape[1]):
        at = slice(start, start + down.shape[1])
        alike += wide[head][:, at].T @ wide[e][:, at]
    return linear_sum_assignment(alike, maximize=True)[1]
