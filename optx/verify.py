"""What must hold after every pass, in both forms of the tree. Each rule is one function; RULES lists them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from optx import ir
from optx.cache import Address, CachePlan, Layout, Ragged
from optx.errors import FormatError, LoweringError, VerifyError
from optx.tensor import is_qtensor

LAYOUT = Layout(pages=3, page_size=4, slots=2)


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
            if name.startswith("_") or isinstance(value, nnx.Variable | nnx.Pytree):
                continue
            for leaf in jax.tree.leaves(value):
                if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                    return f"{path}/{name}: an array outside nnx.Param"
    return None


def specs_frozen(before: nnx.Module, after: nnx.Module) -> str | None:
    """Static attributes are hashable, so that structures compare and programs are cached."""
    for path, module in ir.walk(after):
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, nnx.Variable | nnx.Pytree):
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
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
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
    caches = plan.abstract(LAYOUT)
    groups = len(plan.keys)
    ragged = dataclasses.replace(jax.eval_shape(lambda: Ragged.dense(2, 3)), rectangular=True)
    shape = jax.ShapeDtypeStruct
    address = Address(
        tables=(shape((1, 2, 1), jnp.int32),) * groups,
        lengths=(shape((1, 2), jnp.int32),) * groups,
        writes=(shape((6,), jnp.int32),) * groups,
        slots=shape((2,), jnp.int32),
    )

    def step(model, tokens, ragged, caches, address):
        return model.backbone(tokens, ragged, caches, address)[1]

    out = _eval(step, after, shape((6,), jnp.int32), ragged, caches, address)
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


def check(before: nnx.Module, after: nnx.Module, where: str, rules: tuple[Rule, ...] = RULES) -> None:
    """Raises VerifyError naming the pass, the rule and the path."""
    for rule in rules:
        pair = distinct(before, after) if rule in TRACED else (before, after)
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
    if len(before.layers) != len(after.layers) or any(s is not None and s.share is not None for s in specs):
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
    return jax.eval_shape(lambda state, *args: function(nnx.merge(graph, state), *args), state, *args)
