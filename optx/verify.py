"""What must hold after every pass, in both forms of the tree. Each rule is one function; RULES lists them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from optx import ir
from optx.cache import Address, CachePlan, Layout, Ragged
from optx.errors import FormatError, VerifyError
from optx.tensor import is_qtensor

LAYOUT = Layout(pages=3, page_size=4, slots=2)


def qtensors_fit(before: nnx.Module, after: nnx.Module) -> str | None:
    """Every QTensor's parts fit its format."""
    for path, variable in ir.params(after).items():
        if is_qtensor(variable.get_value()):
            try:
                variable.get_value().validate(path)
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
    for group in ir.aliases(before):
        kept = {path for path in group if path in present}
        if len(kept) > 1 and not any(kept <= other for other in new):
            return f"{', '.join(sorted(kept))}: shared one parameter before and no longer do"
    return None


def logits_unchanged(before: nnx.Module, after: nnx.Module) -> str | None:
    """The forward gives logits of the same shape and dtype."""
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    old, new = (_eval(lambda model, t: model(t), m, tokens) for m in (before, after))
    return None if old == new else f"logits were {old}, are {new}"


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
RULES: tuple[Rule, ...] = (*LOCAL, logits_unchanged, caches_fixpoint)  # whole models, abstract


def check(before: nnx.Module, after: nnx.Module, where: str, rules: tuple[Rule, ...] = RULES) -> None:
    """Raises VerifyError naming the pass, the rule and the path."""
    for rule in rules:
        fault = rule(before, after)
        if fault:
            raise VerifyError(f"after {where}: {rule.__name__}: {fault}")


def _eval(function, model, *args):
    graph, state = nnx.split(ir.abstract(model))
    return jax.eval_shape(lambda state, *args: function(nnx.merge(graph, state), *args), state, *args)
