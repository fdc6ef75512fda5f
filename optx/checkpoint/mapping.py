"""From names in files to paths in the tree: rows beside each model, coverage checked both ways."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.checkpoint.kinds import KINDS, Kind
from optx.errors import CheckpointError
from optx.formats import Format
from optx.ggml import BLOCKS
from optx.nn.core import RMSNorm
from optx.tensor import QTensor, Tensor, quantize


@dataclasses.dataclass(frozen=True)
class Apart:
    """A matrix in a format whose parts are tensors of their own."""

    data: "Raw"
    scale: "Raw"
    format: Format


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raw:
    """A tensor in a file, not read yet. Shape in numpy order; matrices as files keep them, [out, in]."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]  # the array, or uint8[..., packed] rows where a format is given
    format: Format | None = None  # packed along the last axis
    apart: Apart | None = None  # what `read` puts together, where that can stay packed
    where: str = ""  # file

    @property
    def text(self) -> str:
        return f"{self.name} {self.format or self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter and its names in files; `{i}` is the layer, `{n}` how many layers there are, `{e}` the expert. Rows whose
    path a model lacks do not apply to it."""

    path: str
    hf: str | tuple[str, ...]  # several: the parameter is joined from them
    packed: tuple[str, ...] = ()  # HF names that hold it in a format, by the kind's `pack`, where the others are absent
    gguf: str | None = None  # None: the family's GGUF files are not read
    kind: str | Kind = "linear"  # of KINDS
    gguf_heads: Literal["heads", "kv_heads"] | None = None  # rows of each head are in llama.cpp's rope order (pairs)

    @property
    def layout(self) -> Kind:
        return KINDS[self.kind] if isinstance(self.kind, str) else self.kind

    @property
    def patterns(self) -> tuple[str, ...]:
        """HF names, `{e}` not filled in."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf

    def names(self, kind: Literal["hf", "gguf"], shape: tuple[int, ...]) -> list[str]:
        """Tensors that hold the parameter of `shape`, in order; experts are its first axis."""
        if kind == "gguf":
            return [self.gguf or f"(no GGUF name for {self.path})"]
        if not any("{e}" in name for name in self.patterns):
            return list(self.patterns)
        return [name.replace("{e}", str(e)) for e in range(shape[0]) for name in self.patterns]

    def found(self, raws: Mapping[str, Any]) -> "Row":
        """The row as these tensors have it: dense, without `packed`, or packed, which are its names then."""
        if any(name in raws for name in self.packed):
            return dataclasses.replace(self, hf=self.packed)
        return dataclasses.replace(self, packed=())

    def parts(self, array: np.ndarray, module: nnx.Module) -> dict[str, np.ndarray]:
        """The parameter as HF files hold it, by name."""
        parts = self.layout.split(array, module, len(self.patterns))
        return dict(zip(self.names("hf", array.shape), parts, strict=True))


NAMES = ("path", "hf", "packed", "gguf")  # of a row's fields
PACKABLE = ("linear", "experts")  # kinds whose matrices lie [out, in] in files, one by one


def expand(rows: Sequence[Row], layers: int) -> Iterator[Row]:
    def at(name, i):
        if isinstance(name, tuple):
            return tuple(at(n, i) for n in name)
        return name and name.replace("{i}", str(i)).replace("{n}", str(layers))

    for row in rows:
        for i in range(layers) if "{i}" in row.path else (None,):
            yield dataclasses.replace(row, **{key: at(getattr(row, key), i) for key in NAMES})


def holds(raws: Mapping[str, Raw], rows: Sequence[Row], layers: int, prefix: str) -> bool:
    """Whether a tensor is there of any parameter below the path `prefix`."""
    mine = (row for row in expand(rows, layers) if row.path.startswith(f"{prefix}/"))
    return any(name in raws for row in mine for name in row.patterns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Every parameter of a tree bound to a tensor of a file. `load(path)` reads one."""

    sources: Mapping[str, tuple[tuple[Raw, ...], Row]]
    tree: nnx.Module  # abstract, in the form that `load` gives
    kind: Literal["hf", "gguf"]

    def load(self, path: str) -> Tensor:
        """The parameter at `path`, dense or packed as the abstract tree says.

        Raises: CheckpointError for NaN or infinity, naming tensor, file and the first index.
        """
        raws, row = self.sources[path]
        raw, owner = raws[0], ir.get(self.tree, path.rsplit("/", 1)[0])
        want = ir.get(self.tree, path).get_value()
        if row.packed:
            packed = row.layout.pack.make([jnp.asarray(_read(raw)) for raw in raws], want.dtype)
            _check_packed(raw, packed)
            return packed if isinstance(want, QTensor) else _dense(packed)
        if isinstance(want, QTensor) and raw.apart:
            return _put_together(raws, row, owner, want)
        data = _read(raw)
        if row.gguf_heads and self.kind == "gguf":
            mixer = ir.get(self.tree, path.rsplit("/", 2)[0])
            data = unpermute(data, getattr(mixer, row.gguf_heads))
        if isinstance(want, QTensor):
            packed = dataclasses.replace(want, data=jnp.asarray(data))
            if not BLOCKS[want.format.block].finite(data):
                _check_finite(raw, np.asarray(packed.rows()))
            return packed
        if raw.format is not None:
            data = _decode(jnp.asarray(data), raw.format, raw.shape[-1], jnp.dtype(want.dtype))
        if self.kind == "gguf" and isinstance(owner, RMSNorm) and owner.offset:
            data = data - np.asarray(owner.offset, data.dtype)  # GGUF keeps offset + weight
        parts = [data, *(_read(other) for other in raws[1:])]
        for part, of in zip(parts, raws, strict=True):
            _check_finite(of, part)
        data = row.layout.join(parts, owner)
        with np.errstate(over="ignore"):  # looked for below
            value = jnp.asarray(data, want.dtype)
        if value.dtype != data.dtype and not jnp.isfinite(value).all():
            raise CheckpointError(
                f"{raw.where}: {raw.text}: holds values up to {np.max(np.abs(data)):.3g}, beyond {want.dtype}; "
                "load it with another dtype"
            )
        return value

    def bytes(self) -> int:
        return ir.weight_bytes(self.tree)


def bind(
    tree: nnx.Module,
    rows: Sequence[Row],
    raws: Mapping[str, Raw],
    *,
    kind: Literal["hf", "gguf"],
    packed: bool,
    ignored: Sequence[str] = (),
    where: str = "",
) -> Weights:
    """Binds parameters to tensors by `rows`; the tree's parameters take the form in which they will be loaded.

    ignored: regexes of tensor names that carry no parameter.
    Raises: CheckpointError listing missing and left-over tensors, or the shapes that do not fit.
    """
    tree = ir.shallow(tree)
    parameters = ir.params(tree)
    sources, missing, wrong, used = {}, [], [], set()
    by_path = {row.path: row for row in expand(rows, len(tree.layers))}
    for path, variable in parameters.items():
        row = by_path.get(path)
        assert row is not None, f"{path}: the family has no row for this parameter"
        row = row.found(raws)
        value, (owner, last) = variable.get_value(), path.rsplit("/", 1)
        module = ir.get(tree, owner)
        names = row.names(kind, value.shape)
        used |= set(names)
        absent = [name for name in names if name not in raws]
        if absent:
            text = f"{absent[0]} and {len(absent) - 1} more" if len(absent) > 1 else absent[0]
            missing.append(f"{text} (for {path} {ir.tensor_text(value)})")
            continue
        mine = tuple(raws[name] for name in names)
        form = _form(mine, row, value, module, packed)
        if isinstance(form, str):
            wrong.append(form.format(path=path))
            continue
        sources[path] = (mine, row)
        setattr(module, last, nnx.Param(form, axes=variable.get_metadata().get("axes")))
    left = [r.text for n, r in raws.items() if n not in used and not any(re.fullmatch(p, n) for p in ignored)]
    _complain(where, missing, wrong, left)
    return Weights(sources=sources, tree=tree, kind=kind)


def _form(raws: Sequence[Raw], row: Row, value, module, packed: bool):
    """The abstract value that `load` will give, or what does not fit, with `{path}` to fill in."""
    shape, dtype, layout = value.shape, jnp.dtype(value.dtype), row.layout
    if row.packed:
        parts = layout.pack.parts(shape)
        if isinstance(parts, str):
            return f"{raws[0].text}: {{path}} {list(shape)}: {parts}"
        for raw, part in zip(raws, parts, strict=True):
            if (raw.shape, raw.dtype) != (part.shape, part.dtype.name):
                return f"{raw.text}: {{path}} needs {part.dtype.name}{list(part.shape)}"
        return layout.pack.form(shape, dtype) if packed else jax.ShapeDtypeStruct(shape, dtype)
    for raw, need in zip(raws, layout.shapes(shape, module, len(row.patterns)), strict=True):
        if raw.shape != need:
            return f"{raw.text}: {{path}} needs {list(need)}"
        if raw.dtype == "uint8" or raw.dtype.startswith("float8"):
            return f"{raw.text}: {{path}} needs floating-point numbers"
    raw = raws[0]
    if packed and row.kind in PACKABLE and all(part.apart for part in raws):
        return _apart_form(raws, row, shape, dtype)
    if not (packed and raw.format is not None):
        return jax.ShapeDtypeStruct(shape, dtype)
    length = raw.shape[-1]
    data = jax.ShapeDtypeStruct((*raw.shape[:-1], raw.format.packed(length)), jnp.uint8)
    axis = -2 if row.kind == "linear" else -1
    return QTensor(data=data, format=raw.format, length=length, axis=axis, dtype=dtype)


def _apart_form(raws: Sequence[Raw], row: Row, shape, dtype):
    """As `_form`, of a matrix or experts whose files hold data and scales apart."""
    format_ = raws[0].apart.format
    if len(row.patterns) > 1 and any(raw.shape[0] % format_.block_rows for raw in raws):
        return (
            f"{raws[0].text}: {{path}} joins it with {raws[1].name}, and it does not end with a block of "
            f"{format_.block_rows} outputs: load with weights='dense'"
        )
    return quantize(jax.ShapeDtypeStruct(shape, dtype), format_)


def _put_together(raws: Sequence[Raw], row: Row, owner, want: QTensor) -> QTensor:
    parts = {}
    for name in ("data", "scale"):
        read = [_read(getattr(raw.apart, name)) for raw in raws]
        if name == "scale":
            for raw, part in zip(raws, read, strict=True):
                _check_finite(raw.apart.scale, part)
        parts[name] = jnp.asarray(np.swapaxes(row.layout.join(read, owner), -1, -2))
    packed = dataclasses.replace(want, **parts)
    packed.validate(raws[0].name)
    if not bool(jnp.isfinite(jnp.sum(packed.data.astype(jnp.float32)))):  # codes: sums of at most 448 each
        _check_finite(raws[0], np.asarray(packed.rows()))
    return packed


def packed_form(tree: nnx.Module, rows: Sequence[Row]) -> nnx.Module:
    """An abstract dense tree as it is when what has `packed` names is loaded with weights="packed"."""
    tree = ir.shallow(tree)
    parameters = ir.params(tree)
    for row in expand(rows, len(tree.layers)):
        if not row.packed or row.path not in parameters:
            continue
        variable, (owner, last) = parameters[row.path], row.path.rsplit("/", 1)
        form = row.layout.pack.form(variable.get_value().shape, jnp.dtype(variable.get_value().dtype))
        setattr(ir.get(tree, owner), last, nnx.Param(form, axes=variable.get_metadata().get("axes")))
    return tree


def _complain(where, missing, wrong, left) -> None:
    def shown(items):
        return "; ".join(items[:5]) + (f"; and {len(items) - 5} more" if len(items) > 5 else "")

    faults = [f"{label}: {shown(items)}" for label, items in
              (("missing", missing), ("wrong shape", wrong), ("left over", left)) if items]  # fmt: skip
    if faults:
        raise CheckpointError(f"{where}: the tensors do not fit the config. " + ". ".join(faults))


def _read(raw: Raw) -> np.ndarray:
    return raw.read()


def _decode(data, format: Format, length: int, dtype) -> np.ndarray:
    return np.asarray(_dequantize(data, format, length, dtype))


def _dequantize_rows(data, format, length, dtype):
    return QTensor(data=data, format=format, length=length, axis=-1, dtype=dtype).rows()


_dequantize = jax.jit(_dequantize_rows, static_argnums=(1, 2, 3))


def unpermute(data: np.ndarray, heads: int) -> np.ndarray:
    """Rows [N * H, ...] of q or k from llama.cpp's rope order (interleaved pairs) to halves, for any row encoding."""
    out, *rest = data.shape
    pairs = data.reshape(heads, out // heads // 2, 2, *rest)
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(out, *rest)


def permute(data: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `unpermute`."""
    out, *rest = data.shape
    halves = data.reshape(heads, 2, out // heads // 2, *rest)
    return np.ascontiguousarray(np.swapaxes(halves, 1, 2)).reshape(out, *rest)


_dense = jax.jit(lambda packed: packed.dequantize())


def _check_packed(raw: Raw, packed: QTensor) -> None:
    # Codes are finite: a scale says whether its numbers are. Only where one looks wrong are all of them looked at.
    largest = packed.format.factor(packed.scale) * packed.format.top
    if not bool(jnp.isfinite(largest.astype(packed.dtype)).all()):
        _check_finite(raw, np.asarray(packed.rows()))


def _check_finite(raw: Raw, data: np.ndarray) -> None:
    # A sum is finite only if every term is (unless it overflows, which float64 cannot for real weights): one fast pass.
    if np.isfinite(np.sum(data, dtype=np.float64)):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(data, np.float32)))
    if len(bad):
        raise CheckpointError(
            f"{raw.where}: {raw.text}: {len(bad)} values are NaN or infinite, the first at {bad[0].tolist()}; "
            "the file is damaged or the model was saved from a diverged run"
        )
