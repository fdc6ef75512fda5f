"""A model that can be read block by block: an abstract tree, and a way to read each parameter."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from optx import ir
from optx.checkpoint import float8_files, gguf, hf
from optx.checkpoint.config import Fields
from optx.checkpoint.mapping import Raw, Row, bind, holds, packed_form
from optx.errors import CheckpointError, OptxError
from optx.formats import parse
from optx.ggml import BLOCKS
from optx.tensor import Tensor, is_qtensor
from optx.tokenizer import Tokenizer

FamilyOf = Callable[[object, str], ModuleType]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from: enough to build its abstract tree again."""

    name: str
    kind: str  # "hf", "gguf" or "module"
    config: dict[str, Any]  # HF-style; empty for a user's module
    dtype: str
    packed: bool = False
    formats: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> format of parameters packed in the file
    bytes: int = 0  # of the file or files
    draft: bool = False  # the checkpoint holds the draft module that its config speaks of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model not loaded yet. `tree` is abstract, in the form that `read(path)` gives each parameter."""

    tree: nnx.Module
    read: Callable[[str], Tensor]
    origin: Origin
    tokenizer: Tokenizer | None = None
    recipe: Any = None  # the recipe that an export was compiled with; None: not compiled

    def segments(self) -> list[str]:
        """Paths of the blocks that stream in one after the other: `embed`, `layers/0`, ..., `norm`."""
        return [path for path, _ in ir.children(self.tree)]

    def block(self, prefix: str) -> nnx.Module:
        """The block at `prefix` with its weights."""
        return fill(ir.get(self.tree, prefix), lambda path: self.read(f"{prefix}/{path}"))

    def blocks(self) -> Iterator[tuple[str, nnx.Module]]:
        for prefix in self.segments():
            yield prefix, self.block(prefix)

    def load(self) -> nnx.Module:
        """The whole model with its weights."""
        tree = ir.shallow(self.tree)
        for prefix, block in self.blocks():
            ir.put(tree, prefix, block)
        return tree

    def __str__(self):
        return ir.describe(self.tree)


def fill(tree: nnx.Module, read: Callable[[str], Tensor]) -> nnx.Module:
    """A copy of an abstract tree with every parameter read."""
    out = ir.shallow(tree)
    filled: dict[int, nnx.Param] = {}  # a parameter that stands in several places is read once and stays shared
    for path, variable in ir.params(tree).items():
        owner, _, last = path.rpartition("/")
        if id(variable) not in filled:
            filled[id(variable)] = nnx.Param(read(path), axes=variable.get_metadata().get("axes"))
        setattr(ir.get(out, owner), last, filled[id(variable)])
    return out


def from_module(model: nnx.Module, name: str = "module", tokenizer: Tokenizer | None = None) -> Source:
    """A module in memory, concrete or abstract, as a source."""
    values = {path: v.get_value() for path, v in ir.params(model).items()}
    dtype = str(next(iter(jax.tree.leaves(values))).dtype)
    origin = Origin(name=name, kind="module", config={}, dtype=dtype, bytes=ir.weight_bytes(model))

    def read(path: str) -> Tensor:
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(values[path])):
            raise CheckpointError(f"{name}: {path} is a shape without numbers; it can be described and planned")
        return values[path]

    return Source(tree=ir.abstract(model), read=read, origin=origin, tokenizer=tokenizer)


def open_hf(folder: Path, family_of: FamilyOf, *, dtype: str | None, packed: bool = False) -> Source:
    """An HF directory; dtype None: the checkpoint's own. packed: what it holds in blocks stays so."""
    where = str(folder / "config.json")
    config, blocks = float8_files.blocks_of(hf.read_config(folder / "config.json"), where)
    rows = family_of(config.get("model_type"), where).ROWS
    _check_quantized(config, rows, where)
    raws = hf.read_tensors(folder)
    raws = raws if blocks is None else float8_files.joined(raws, blocks)
    dtype = dtype or _common_dtype(raws, folder)
    origin = Origin(
        name=folder.name, kind="hf", config=config, dtype=dtype, bytes=_size(folder.glob("*.safetensors")), draft=True
    )
    tree, family = build(origin, family_of, where)
    if not holds(raws, family.ROWS, len(tree.layers), "draft"):
        origin, tree = dataclasses.replace(origin, draft=False), _without_draft(tree)
    weights = bind(
        tree, family.ROWS, raws, kind="hf", packed=packed, where=str(folder),
        ignored=(*family.IGNORED, *(("lm_head.weight",) if tree.output is None else ())),
    )  # fmt: skip
    if packed:
        origin = _packed(origin, weights.tree, str(folder))
    return Source(tree=weights.tree, read=weights.load, origin=origin, tokenizer=_hf_tokenizer(folder))


def _check_quantized(config: dict, rows: Sequence[Row], where: str) -> None:
    """Raises CheckpointError for a quantized checkpoint of a family that has no rows for one."""
    if "quantization_config" in config and not any(row.packed for row in rows):
        details = config["quantization_config"]
        method = details.get("quant_method") if isinstance(details, dict) else details
        raise CheckpointError(f"{where}: quantized checkpoint ({method}); supported here: dense safetensors, and GGUF")


def _packed(origin: Origin, tree: nnx.Module, where: str) -> Origin:
    """The origin with the formats of the tree's packed parameters. Raises CheckpointError when there is none."""
    values = {path: variable.get_value() for path, variable in ir.params(tree).items()}
    formats = {path: str(value.format) for path, value in values.items() if is_qtensor(value)}
    if not formats:
        raise CheckpointError(
            f"{where}: weights='packed' is for GGUF files, MXFP4 and fp8 checkpoints; this one's tensors are dense"
        )
    return dataclasses.replace(origin, packed=True, formats=formats)


def open_config(
    path: Path, family_of: FamilyOf, *, dtype: str | None, allowed: Sequence[str], packed: bool = False
) -> Source:
    """A bare config.json: shapes without weights. dtype None: the config's own, float32 where it names none; packed: as
    the quantized checkpoint that it is of would be."""
    config = hf.read_config(path)
    named = config.get("torch_dtype") or config.get("dtype")
    named = named or ("bfloat16" if "quantization_config" in config else "float32")  # of what stands beside blocks
    config, _ = float8_files.blocks_of(config, str(path))
    dtype = dtype or str(named).removeprefix("torch.")
    if dtype not in allowed:
        raise CheckpointError(f"{path}: dtype {dtype!r}; supported: {', '.join(allowed)}; or choose one of them")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    origin = Origin(name=name or path.stem, kind="hf", config=config, dtype=dtype)
    tree, family = build(origin, family_of, str(path))
    if packed:
        tree = packed_form(tree, family.ROWS) if "quantization_config" in config else tree
        origin = _packed(origin, tree, str(path))

    def read(parameter: str) -> Tensor:
        raise CheckpointError(f"{path}: a config holds no weights, not {parameter}; it can be described and planned")

    return Source(tree=tree, read=read, origin=origin)


def open_gguf(path: Path, family_of: FamilyOf, *, dtype: str, packed: bool) -> Source:
    """A GGUF file. packed: block formats stay as they are in the file."""
    file = gguf.read_gguf(path)
    raws = {name: _raw(tensor, path) for name, tensor in file.tensors.items()}
    family = family_of(file.metadata.get("general.architecture"), str(path))
    config = family.gguf_config(Fields(file.metadata, str(path)), file.tensors)
    config["model_type"] = next(iter(family.HF_TYPES))
    origin = Origin(name=path.stem, kind="gguf", config=config, dtype=dtype, packed=packed, bytes=path.stat().st_size)
    tree = family.from_hf(Fields(config, str(path)), dtype)
    weights = bind(tree, family.ROWS, raws, kind="gguf", packed=packed, ignored=family.IGNORED, where=str(path))
    formats = {
        p: str(raws[0].format) for p, (raws, _) in weights.sources.items() if packed and raws[0].format is not None
    }
    return Source(
        tree=weights.tree,
        read=weights.load,
        origin=dataclasses.replace(origin, formats=formats),
        tokenizer=Tokenizer.from_gguf(file.metadata),
    )


def build(origin: Origin, family_of: FamilyOf, where: str) -> tuple[nnx.Module, ModuleType]:
    """The abstract dense tree of an origin's config, and its family."""
    family = family_of(origin.config.get("model_type"), where)
    tree = family.from_hf(Fields(origin.config, where), origin.dtype)
    return (tree if origin.draft else _without_draft(tree)), family


def _without_draft(tree: nnx.Module) -> nnx.Module:
    return tree if tree.draft is None else ir.replace(tree, draft=None)


def _raw(tensor, path: Path) -> Raw:
    packed = tensor.type in BLOCKS
    return Raw(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.type.lower(),
        read=tensor.read,
        format=parse(tensor.type) if packed else None,
        where=str(path),
    )


def _common_dtype(raws: dict[str, Raw], folder: Path) -> str:
    """The dtype of most of the checkpoint's numbers; float32 for float64, which JAX does not compute in."""
    if not raws:
        raise CheckpointError(f"{folder}: holds no tensor")
    counts: dict[str, int] = {}
    for raw in raws.values():
        if raw.dtype == "uint8":
            continue  # blocks of another format
        counts[raw.dtype] = counts.get(raw.dtype, 0) + math.prod(raw.shape)
    most = max(counts, key=counts.__getitem__, default="float32")
    return "float32" if most == "float64" else most


def _hf_tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.from_hf_dir(folder) if (folder / "tokenizer.json").exists() else None


def _size(paths) -> int:
    return sum(os.path.getsize(path) for path in paths)


def describe_error(error: OSError, path: Path) -> OptxError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")
