"""The module tree as an intermediate representation: walk it, print it, compare it, rebuild it out of place.

Paths are attribute names and list indices joined by `/`: `layers/3/mixer/q`.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.pytreelib import PytreeState

from optx import tensor
from optx.errors import PassError, did_you_mean
from optx.tensor import is_packed

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int32": "i32", "int8": "i8"}
LEAF = jax.tree.structure(0)
FOLDED_ATTRIBUTES = ("choices",)  # shown by `explain`, not by `describe`


class _Bases(dict):
    """Which of flax's classes a class is of: asking each value costs more than all the rest of a walk."""

    def __missing__(self, kind: type) -> type | None:
        bases = (nnx.Variable, nnx.List, nnx.Module, nnx.Pytree)
        return self.setdefault(kind, next((base for base in bases if issubclass(kind, base)), None))


_base = _Bases().__getitem__


def children(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Direct submodules as (relative path, module), list entries as `name/i`, in the order of their definition."""
    for name, value in vars(module).items():
        base = _base(type(value))
        if base is nnx.List:
            yield from ((f"{name}/{i}", item) for i, item in enumerate(value) if isinstance(item, nnx.Module))
        elif base is nnx.Module:
            yield name, value


def walk(module: nnx.Module, path: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """Every module of the tree, parents first, with its path; the root's path is ''."""
    todo = [(path, module)]
    while todo:
        path, module = todo.pop()
        yield path, module
        todo += [(f"{path}/{name}" if path else name, child) for name, child in children(module)][::-1]


def params(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Direct and nested Variables by path; a Variable that stands in two places appears under both."""
    return {
        f"{path}/{name}".lstrip("/"): value
        for path, node in walk(module)
        for name, value in vars(node).items()
        if _base(type(value)) is nnx.Variable
    }


def get(module: nnx.Module, path: str) -> Any:
    """The module or attribute at `path`. Raises PassError naming the nearest child."""
    node = module
    for part in path.split("/") if path else ():
        try:
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        except (AttributeError, IndexError, TypeError):
            names = _public(node) if isinstance(node, nnx.Pytree) else ()
            raise PassError(f"{path}: nothing at {part!r}{did_you_mean(part, names)}") from None
    return node


def replace(module: nnx.Module, **changes) -> nnx.Module:
    """A copy of `module` with attributes set; variables and other attributes are shared, the original stays as it was.

    A plain value given for a parameter becomes a new parameter with the old one's metadata: never a write into it.
    Raises: PassError for an attribute that the module does not have.
    """
    copy = shallow(module)
    for name, value in changes.items():
        if name not in vars(module):
            raise PassError(f"{type(module).__name__} has no attribute {name!r}{did_you_mean(name, _public(module))}")
        old = vars(module)[name]
        if isinstance(old, nnx.Variable) and value is not None and not isinstance(value, nnx.Variable):
            value = type(old)(value, axes=old.get_metadata().get("axes"))
        _set(copy, name, value)
    return copy


def _set(module, name, value):
    """Sets an attribute as if it had been built so: flax keeps apart attributes that hold data and those that do not."""
    setattr(module, name, nnx.data(value) if isinstance(value, nnx.Variable | nnx.Pytree) else nnx.static(value))


def shallow(module: nnx.Module) -> nnx.Module:
    """New module objects over the same Variables; a module that stands in two places still does."""
    return _copy(module, {})


def _copy(module: nnx.Pytree, seen: dict[int, nnx.Pytree]) -> nnx.Pytree:
    """What `nnx.clone(module, variables=False)` makes, with attributes in their order and without its way through a graph
    definition, which takes 20 times as long. The state of a new object lets it be changed under the current trace."""
    if id(module) not in seen:
        seen[id(module)] = copy = object.__new__(type(module))
        attributes = vars(copy)
        for name, value in vars(module).items():
            attributes[name] = value if _base(type(value)) in (None, nnx.Variable) else _copy(value, seen)
        attributes["_pytree__state"] = PytreeState()
    return seen[id(module)]


def _ordered(like: nnx.Module, module: nnx.Module) -> nnx.Module:
    """Puts attributes back into the order of `like`: flax sorts them when it rebuilds, and printing follows it."""
    for (_, old), (_, new) in zip(walk(like), walk(_sort_attributes(like, module)), strict=True):
        _sort_attributes(old, new)
    return module


def _sort_attributes(like, module):
    attributes = vars(module)
    values = {name: attributes[name] for name in vars(like) if name in attributes}
    attributes.clear()
    attributes.update(values)
    return module


def put(module: nnx.Module, path: str, value: nnx.Module) -> None:
    """Sets the submodule at `path` of a tree made by `shallow` (in place: only for trees that the caller owns).

    Raises: PassError when nothing stands at `path`.
    """
    get(module, path)
    *parents, last = path.split("/")
    parent = get(module, "/".join(parents))
    if last.isdigit():
        parent[int(last)] = value
    else:
        _set(parent, last, value)


def abstract(module: nnx.Module) -> nnx.Module:
    """The same tree with shapes in place of arrays."""
    graph, state = nnx.split(module)
    return _ordered(module, nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)))


def is_abstract(module: nnx.Module) -> bool:
    leaves = (leaf for value in params(module).values() for leaf in jax.tree.leaves(value.get_raw_value()))
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def init_weights(module: nnx.Module, seed: int = 0, scale: float = 1.0) -> nnx.Module:
    """A concrete copy of an abstract tree with random dense weights, drawn by numpy (fast on a CPU) for tests and benches.

    Matrices ~ N(0, scale^2 / fan_in), vectors of norms stay near their neutral value.
    """
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(module)

    def draw(leaf):
        x = rng.standard_normal(leaf.shape, dtype=np.float32)
        x = x * (scale * leaf.shape[-2] ** -0.5) if len(leaf.shape) > 1 else 1 + 0.1 * x
        return jnp.asarray(x, leaf.dtype)

    return _ordered(module, nnx.merge(graph, jax.tree.map(draw, state)))


def signature(module: nnx.Module) -> tuple:
    """Equal for modules that compute the same function of their weights: structure, specs, formats, shapes, dtypes.

    flax's graph definition holds less (it does not tell a dense weight from a packed one) and takes 20 times as long.
    """
    return _signature(module, {})


def _signature(value: Any, seen: dict[int, int]) -> tuple:
    """seen: modules and Variables by id, numbered as they are met, which tells one that stands in two places."""
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    base = _base(type(value))
    if base is nnx.Variable:
        return type(value), tuple(sorted(value.get_metadata().items())), _leaves(value.get_raw_value())
    parts = []
    holds_data = value._pytree__nodes
    for name, part in sorted(vars(value).items()):
        if name != "_pytree__state":  # of this object, not of what it computes
            if _base(type(part)) is not None:
                part = _signature(part, seen)
            elif holds_data.get(name):
                part = _leaves(part)
            parts.append((name, part))
    return type(value), tuple(parts)


def _leaves(value: Any) -> tuple:
    """Structure of a plain value, shapes and dtypes of its leaves."""
    leaves, treedef = ([value], LEAF) if isinstance(value, jax.ShapeDtypeStruct) else jax.tree.flatten(value)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def weight_bytes(module: nnx.Module) -> int:
    """Stored bytes of all parameters; a shared one counts once."""
    return sum(tensor.nbytes(v.get_raw_value()) for v in _distinct(module))


def weight_count(module: nnx.Module) -> int:
    """Numbers that the parameters stand for; a shared one counts once."""
    return sum(math.prod(v.get_raw_value().shape) for v in _distinct(module))


def active_count(module: nnx.Module) -> int:
    """Numbers that one token meets: of parts that run in part (`active`: their share), that share."""
    return weight_count(module) - round(sum((1 - share) * weight_count(part) for part, share in _in_part(module)))


def active_bytes(module: nnx.Module, tokens: int = 1) -> int:
    """Stored bytes of the parameters that some of `tokens` meets: as `weight_bytes`, but of parts that run in part the share
    1 - (1 - active)^tokens. With uniform routing E (1 - (1 - k / E)^B) of E experts are expected to be met by B tokens.
    """
    idle = sum((1 - share) ** tokens * weight_bytes(part) for part, share in _in_part(module))
    return weight_bytes(module) - round(idle)


def _in_part(module) -> list[tuple[nnx.Module, float]]:
    parts = [(part, getattr(part, "active", 1.0)) for _, part in walk(module)]
    return [(part, share) for part, share in parts if share < 1]


def _distinct(module) -> list[nnx.Variable]:
    return list({id(v): v for v in params(module).values()}.values())


def aliases(module: nnx.Module) -> frozenset[frozenset[str]]:
    """Groups of paths at which one Variable stands."""
    groups: dict[int, set[str]] = {}
    for path, variable in params(module).items():
        groups.setdefault(id(variable), set()).add(path)
    return frozenset(frozenset(group) for group in groups.values() if len(group) > 1)


def tensor_text(x) -> str:
    """`f32[576, 1536]`, `int4_g64[576, 1536]`."""
    kind = str(x.format) if is_packed(x) else SHORT.get(jnp.dtype(x.dtype).name, jnp.dtype(x.dtype).name)
    return f"{kind}{list(x.shape)}"


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _public(module) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


def _line(module: nnx.Module, last: nnx.Module) -> str:
    """Class, static attributes and own parameters of one module, without its children. last: of those it stands for."""
    facts, tensors = [], []
    for name in _public(module):
        value = vars(module)[name]
        if isinstance(value, nnx.Variable):
            bare = name in ("weight", "table")
            tensors.append(tensor_text(value.get_value()) if bare else f"{name}={tensor_text(value.get_value())}")
        elif isinstance(value, nnx.Pytree) or name in FOLDED_ATTRIBUTES or value is None:
            continue
        else:
            ends = (value, getattr(last, name)) if name in _by_layer(module) else (value,)
            text = "..".join(dict.fromkeys(f"{end:g}" if isinstance(end, float) else str(end) for end in ends))
            facts.append(f"{name}=({text})" if " " in text else f"{name}={text}")
    return " ".join([type(module).__name__, *tensors, *facts])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the printed tree: `count` equal modules at `paths`."""

    path: str
    depth: int
    text: str
    bytes: int


def entries(module: nnx.Module, path: str = "", depth: int = 0, like: Sequence[nnx.Module] = ()) -> Iterator[Entry]:
    """The tree parents first, equal entries of a list folded into one: `layers/0-4,6-10`, or `layers/0-6 of every 8 to 79`.

    like: the modules for which this one stands, itself first; itself alone when empty.
    """
    like = like or (module,)
    own = sum(tensor.nbytes(v.get_raw_value()) for v in vars(module).values() if _base(type(v)) is nnx.Variable)
    yield Entry(path, depth, _line(module, like[-1]), own * len(like))
    for name, value in vars(module).items():
        if isinstance(value, nnx.List):
            for indices in _folds(value):
                where = f"{path}/{name}/{_ranges(indices, len(value))}".lstrip("/")
                same = [getattr(m, name)[i] for m in like for i in indices]
                yield from entries(value[indices[0]], where, depth + 1, same)
        elif isinstance(value, nnx.Module):
            yield from entries(value, f"{path}/{name}".lstrip("/"), depth + 1, [getattr(m, name) for m in like])


def _by_layer(module: nnx.Module) -> tuple[str, ...]:
    """Numbers that change from layer to layer, which a class may name in `BY_LAYER`."""
    return getattr(type(module), "BY_LAYER", ())


def _folds(items: nnx.List) -> list[list[int]]:
    """Indices of equal items. Their numbers by layer may differ where they lie on a straight line over the indices: its ends
    then say all."""
    lines: dict[tuple, list[int]] = {}
    for i, item in enumerate(items):
        lines.setdefault(_key_without(item), []).append(i)
    folds: list[list[int]] = []
    for indices in lines.values():
        if all(_straight(indices, values) for values in zip(*(_numbers(items[i]) for i in indices), strict=True)):
            folds.append(indices)
            continue
        equal: dict[tuple, list[int]] = {}
        for i in indices:
            equal.setdefault(signature(items[i]), []).append(i)
        folds += equal.values()
    return sorted(folds)


def _numbers(module: nnx.Module) -> list[float]:
    return [getattr(part, name) for _, part in walk(module) for name in _by_layer(part)]


def _key_without(module: nnx.Module) -> tuple:
    """The signature but for numbers by layer."""
    if not _numbers(module):
        return signature(module)
    copy = shallow(module)
    for _, part in walk(copy):
        for name in _by_layer(part):
            _set(part, name, None)
    return signature(copy)


def _straight(indices: Sequence[int], values: Sequence[float]) -> bool:
    line = np.interp(indices, (indices[0], indices[-1]), (values[0], values[-1]))
    return bool(np.allclose(values, line, rtol=1e-9, atol=1e-12))


LISTED = 4  # runs of indices up to which they are listed


def _ranges(indices: list[int], total: int) -> str:
    """[0, 1, 2, 5] -> '0-2,5'; many runs that repeat to the end of the list -> '0-2,5 of every 8 to 39'."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    if len(runs) > LISTED:
        for period in range(2, total // 2 + 1):
            first = [i for i in indices if i < period]
            if first and indices == [i for i in range(total) if i % period in first]:
                return f"{_ranges(first, total)} of every {period} to {total - 1}"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def summary(module: nnx.Module) -> str:
    """`134,515,008 params, 538.1 MB, KV 46,080 B/token`."""
    text = f"{weight_count(module):,} params, {size_text(weight_bytes(module))}"
    plan = getattr(module, "cache_plan", None)
    if plan is None:
        return text
    specs = [s for s in plan().specs if s is not None]
    per_token = sum(s.unit_bytes for s in specs if s.holds_tokens)
    state = sum(s.unit_bytes for s in specs if not s.holds_tokens)
    return f"{text}, KV {per_token:,.0f} B/token" + (f", state {state:,.0f} B/row" if state else "")


def describe(module: nnx.Module) -> str:
    """The tree as text: one line a module with its class, static facts, parameter types and bytes."""
    lines = [f"# {summary(module)}"]
    for entry in entries(module):
        parts = entry.path.rsplit("/", 2)
        label = "/".join(parts[-2:]) if parts[-1][:1].isdigit() else parts[-1]
        size = f"  # {size_text(entry.bytes)}" if entry.bytes >= 1000 else ""
        lines.append(f"{'  ' * entry.depth}{label + ': ' if label else ''}{entry.text}{size}")
    return "\n".join(lines) + "\n"


def diff(before: nnx.Module, after: nnx.Module) -> str:
    """What a rewrite changed, line by line with full paths; '' when nothing did."""
    old, new = ([f"{e.path or '.'}: {e.text}" for e in entries(m)] for m in (before, after))
    lines = [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if not line.startswith("@@")][2:]
    return "\n".join(lines) + "\n" if lines else ""
