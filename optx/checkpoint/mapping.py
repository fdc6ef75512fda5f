"""From names in files to paths in the tree: rows beside each model, coverage checked both ways."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.errors import CheckpointError
from optx.formats import Format
from optx.ggml import BLOCKS
from optx.nn.core import RMSNorm
from optx.tensor import QTensor, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raw:
    """A tensor in a file, not read yet. Shape in numpy order; matrices as files keep them, [out, in]."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]  # the array, or uint8[..., packed] rows where a format is given
    format: Format | None = None  # packed along the last axis
    where: str = ""  # file

    @property
    def text(self) -> str:
        return f"{self.name} {self.format or self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter and its names in files; `{i}` is the layer. Rows whose path a model lacks do not apply to it."""

    path: str
    hf: str
    gguf: str
    kind: Literal["linear", "table", "vector"] = "linear"  # linear: [out, in] in files, [D, F] in the tree
    gguf_heads: Literal["heads", "kv_heads"] | None = None  # rows of each head are in llama.cpp's rope order (pairs)


def expand(rows: Sequence[Row], layers: int) -> Iterator[Row]:
    for row in rows:
        for i in range(layers) if "{i}" in row.path else (None,):
            names = {key: getattr(row, key).replace("{i}", str(i)) for key in ("path", "hf", "gguf")}
            yield dataclasses.replace(row, **names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Every parameter of a tree bound to a tensor of a file. `load(path)` reads one."""

    sources: Mapping[str, tuple[Raw, Row]]
    tree: nnx.Module  # abstract, in the form that `load` gives
    kind: Literal["hf", "gguf"]

    def load(self, path: str) -> Tensor:
        """The parameter at `path`, dense or packed as the abstract tree says.

        Raises: CheckpointError for NaN or infinity, naming tensor, file and the first index.
        """
        raw, row = self.sources[path]
        want = ir.get(self.tree, path).get_value()
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
        owner = ir.get(self.tree, path.rsplit("/", 1)[0])
        if self.kind == "gguf" and isinstance(owner, RMSNorm) and owner.offset:
            data = data - np.asarray(owner.offset, data.dtype)  # GGUF keeps offset + weight
        _check_finite(raw, data)
        with np.errstate(over="ignore"):  # looked for below
            value = jnp.asarray(data.T if row.kind == "linear" else data, want.dtype)
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
    dtype: str,
    ignored: Sequence[str] = (),
    where: str = "",
) -> Weights:
    """Binds parameters to tensors by `rows`; the tree's parameters take the form in which they will be loaded.

    ignored: regexes of tensor names that carry no parameter.
    Raises: CheckpointError listing missing and left-over tensors, or the shapes that do not fit.
    """
    tree = ir.shallow(tree)
    parameters = ir.params(tree)
    sources, missing, wrong = {}, [], []
    by_path = {row.path: row for row in expand(rows, len(tree.layers))}
    for path, variable in parameters.items():
        row = by_path.get(path)
        assert row is not None, f"{path}: the family has no row for this parameter"
        name = getattr(row, kind)
        if name not in raws:
            missing.append(f"{name} (for {path} {ir.tensor_text(variable.get_value())})")
            continue
        raw, shape = raws[name], variable.get_value().shape
        need = shape[::-1] if row.kind == "linear" else shape
        if raw.shape != need:
            wrong.append(f"{raw.text}: {path} needs {list(need)}")
            continue
        sources[path] = (raw, row)
        axes = variable.get_metadata().get("axes")
        owner, last = path.rsplit("/", 1)
        setattr(ir.get(tree, owner), last, nnx.Param(_form(raw, row, shape, packed, dtype), axes=axes))
    used = {raw.name for raw, _ in sources.values()}
    left = [r.text for n, r in raws.items() if n not in used and not any(re.fullmatch(p, n) for p in ignored)]
    wrong_names = {text.split(" ")[0] for text in wrong}
    left = [text for text in left if text.split(" ")[0] not in wrong_names]
    _complain(where, missing, wrong, left)
    return Weights(sources=sources, tree=tree, kind=kind)


def _form(raw: Raw, row: Row, shape, packed: bool, dtype: str):
    """The abstract value that `load` will give."""
    if not (packed and raw.format is not None):
        return jax.ShapeDtypeStruct(shape, dtype)
    length = raw.shape[-1]
    data = jax.ShapeDtypeStruct((*raw.shape[:-1], raw.format.packed(length)), jnp.uint8)
    axis = -2 if row.kind == "linear" else -1
    return QTensor(data=data, format=raw.format, length=length, axis=axis, dtype=jnp.dtype(dtype))


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
