"""What must hold after every pass, in both forms of the tree. Each rule is one function; RULES lists them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.cache import Address, CachePlan, Layout, Ragged, View
from optx.errors import FormatError, LoweringError, VerifyError
from optx.pallas import dispatch
from optx.tensor import is_qtensor

ROWS, LENGTH = 2, 9  # of what is traced: more tokens than a cache stores one by one, which takes longer to trace
LAYOUT = Layout(pages=3, page_size=4, slots=ROWS)


def qtensors_fit(before: nnx.Module, after: nnx.Module) -> str | None:
    """Every QTensor's parts fit its format."""
    for path, variable in ir.params(after).items():
        if is_qtensor(variable.get_raw_value()):
            try:
                variable.get_raw_value().validate(path)
            except FormatError as error:
                return str(error)
    return None


def arrays_in_variables(before: nnx.Module, after: nnx.Module) -> str | None:
    """No array stands outside a Variable, where neither state nor graph definition would carry it right."""
    for path, module in ir.walk(after):
        for name, value in vars(module).items():
            if name.startswith("_") or issubclass(type(value), nnx.Variable | nnx.Pytree):
                continue
            for leaf in jax.tree.leaves(value):
                if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                    return f"{path}/{name}: an array outside nnx.Param"
    return None


def specs_frozen(before: nnx.Module, after: nnx.Module) -> str | None:
    """Static attributes are hashable, so that structures compare and programs are cached."""
    for path, module in ir.walk(after):
        for name, value in vars(module).items():
            if name.startswith("_") or issubclass(type(value), nnx.Variable | nnx.Pytree):
                continue
            try:
                hash(value)
            except TypeError:
                return f"{path}/{name}: {type(value).__name__} cannot be hashed; use a frozen dataclass or a tuple"
    return None


def sharing_unchanged(before: nnx.Module, after: nnx.Module) -> str | None:
    """Parameters that stood in several places still do."""
    new = ir.aliases(after)
    present = ir.params(after)
    for group in sorted(ir.aliases(before), key=sorted):
        kept = {path for path in group if path in present}
        if len(kept) > 1 and not any(kept <= other for other in new):
            return f"{', '.join(sorted(kept))}: shared one parameter before and no longer do"
    return None


def logits_unchanged(before: nnx.Module, after: nnx.Module) -> str | None:
    """The forward gives logits of the same shape and dtype."""
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    old, new = (_logits(_Forward(ir.signature(m), ir.abstract(m)), tokens) for m in (before, after))
    return None if old == new else f"logits were {old}, are {new}"


@dataclasses.dataclass(frozen=True)
class _Forward:
    """A model of shapes that equals another of the same signature, whose forward traces to the same shapes."""

    signature: tuple
    model: nnx.Module = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=64)
def _logits(forward: _Forward, tokens: jax.ShapeDtypeStruct):
    """Remembered: what one pass leaves is what the next one meets."""
    return _eval(lambda model, t: model(t), forward.model, tokens)


def caches_fixpoint(before: nnx.Module, after: nnx.Module) -> str | None:
    """A step returns caches of the structure, shapes and dtypes that it was given."""
    plan: CachePlan = after.cache_plan()
    pages = {spec.page for spec in plan.specs if spec is not None and spec.page > 1} or {LAYOUT.page_size}
    caches = plan.abstract(dataclasses.replace(LAYOUT, page_size=math.lcm(*pages)))
    groups = len(plan.keys)
    ragged = dataclasses.replace(jax.eval_shape(lambda: Ragged.dense(ROWS, LENGTH)), rectangular=True)
    shape = jax.ShapeDtypeStruct
    address = Address(
        tables=(shape((1, ROWS, 1), jnp.int32),) * groups,
        lengths=(shape((1, ROWS), jnp.int32),) * groups,
        writes=(shape((ROWS * LENGTH,), jnp.int32),) * groups,
        slots=shape((ROWS,), jnp.int32),
        prompts=shape((ROWS,), jnp.int32),
    )

    def step(model, tokens, ragged, caches, address):
        return model.backbone(tokens, ragged, caches, address)[1]

    out = _eval(step, after, shape((ROWS * LENGTH,), jnp.int32), ragged, caches, address)
    if jax.tree.structure(out) != jax.tree.structure(caches):
        return f"caches change structure: {jax.tree.structure(caches)} -> {jax.tree.structure(out)}"
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(caches), jax.tree.leaves(out), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return f"caches{jax.tree_util.keystr(path)}: {ir.tensor_text(old)} goes in, {ir.tensor_text(new)} comes out"
    return None


Rule = Callable[[nnx.Module, nnx.Module], str | None]
LOCAL: tuple[Rule, ...] = (qtensors_fit, arrays_in_variables, specs_frozen, sharing_unchanged)  # any subtree
TRACED: tuple[Rule, ...] = (logits_unchanged, caches_fixpoint)  # whole models, abstract
RULES: tuple[Rule, ...] = (*LOCAL, *TRACED)


def check(before: nnx.Module, after: nnx.Module, where: str, rules: Sequence[Rule] = RULES) -> None:
    """Raises VerifyError naming the pass, the rule and the path."""
    few = None
    for rule in rules:
        if rule in TRACED:
            few = few or distinct(before, after)
        pair = few if rule in TRACED else (before, after)
        fault = _fault(rule, *pair, where)
        if fault and pair[1] is not after:
            fault = _fault(rule, before, after, where)  # with the paths of the whole model
        if fault:
            raise VerifyError(f"after {where}: {rule.__name__}: {fault}")


def _fault(rule: Rule, before: nnx.Module, after: nnx.Module, where: str) -> str | None:
    try:
        return rule(before, after)
    except (TypeError, ValueError, AttributeError, FormatError, LoweringError) as error:  # of a forward that breaks
        what = (str(error).strip() or "no message").splitlines()[0]
        raise VerifyError(f"after {where}: {rule.__name__}: the model does not run: {what}") from error


def distinct(before: nnx.Module, after: nnx.Module) -> tuple[nnx.Module, nnx.Module]:
    """Both models with one layer of every kind: equal layers trace equally, and tracing is what verification costs."""
    specs = (*before.cache_plan().specs, *after.cache_plan().specs)
    if len(before.layers) != len(after.layers) or any(s is not None and s.follows is not None for s in specs):
        return before, after
    kinds: dict[tuple, int] = {}
    for i, (old, new) in enumerate(zip(before.layers, after.layers)):
        kinds.setdefault((ir.signature(old), ir.signature(new)), i)
    models = ir.shallow(before), ir.shallow(after)
    for model in models:
        model.layers = nnx.List([model.layers[i] for i in kinds.values()])
    return models


def _eval(function, model, *args):
    graph, state = nnx.split(ir.abstract(model))

    def run(state, *args):
        model = nnx.merge(graph, state)
        for part in [part for layer in model.layers for _, part in ir.children(layer)]:
            if next(ir.children(part), None):  # larger than a norm
                part.__class__ = _once(type(part))
        return function(model, *args)

    with dispatch.through(_op_once):
        return jax.eval_shape(run, state, *args)


@functools.cache
def _once(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls are traced once; one a class, as flax keeps every class for good."""

    def call(self, *args, **kwargs):
        return _shapes_of(ir.signature(self), functools.partial(kind.__call__, self), args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def _op_once(run: Callable, *args, **kwargs):
    return _shapes_of(run, run, args, kwargs)


@dataclasses.dataclass(frozen=True)
class _Array:
    """What the shapes of a result depend on of an array."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    weak: bool  # its dtype gives way to that of an array beside it


_known: dict[tuple, tuple] = {}  # (what is called, arguments without numbers) -> structure, shapes of what it returns
KNOWN = 4096  # calls that are remembered


def _shapes_of(what: Hashable, run: Callable, args: tuple, kwargs: dict):
    """run(*args, **kwargs), or zeros of its shapes where `what` was traced with such arguments before: shapes are all that
    verification reads, and a model calls equal parts and ops with equal shapes in every layer and after every pass."""
    key = (what, _without_numbers((args, kwargs)))
    if key not in _known:
        out = run(*args, **kwargs)
        found, returned = jax.tree.flatten(out)
        if len(_known) < KNOWN and not any(x.weak_type for x in found):  # zeros would not be
            _known[key] = returned, [(x.shape, x.dtype) for x in found]
        return out
    returned, found = _known[key]
    return jax.tree.unflatten(returned, [jnp.zeros(*x) for x in found])


def _without_numbers(value) -> tuple:
    """Equal for arguments of which equal shapes come."""
    leaves, structure = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, nnx.Module))
    return (structure, *map(_leaf, leaves))


def _leaf(x):
    """An array by its shape, a module by its signature, anything else with its type: 1 == True."""
    if isinstance(x, nnx.Module):
        return ir.signature(x)
    if isinstance(x, jax.Array | np.ndarray):
        return _Array(x.shape, x.dtype, getattr(x, "weak_type", False))
    return type(x), _without_numbers(vars(x)) if isinstance(x, View) else x
