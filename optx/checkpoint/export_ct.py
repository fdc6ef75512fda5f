"""Compressed-tensors checkpoints: packed weights stay packed, under the names that vLLM, SGLang and transformers read.

Layouts and names are those of the `compressed-tensors` package (0.9 to 0.20): `weight_packed`, `weight_scale`,
`weight_zero_point`, `weight_global_scale`, and `quantization_config` in config.json. Joined projections are split, experts are
written one by one. Nothing is rounded again, with one exception: nvfp4 has one outer scale a tensor there, which q, k and v (gate
and up) must share, where optx has one a row; `optx_export.json` says which weights that changed, and by how much.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from optx import ir, tensor
from optx.cache import CacheSpec
from optx.checkpoint.ct_schemes import SCHEMES, Scheme, Tensors, one_outer, values
from optx.checkpoint.export import atomic_folder, umask
from optx.checkpoint.export_hf import SHARD, check_expressible, hf_config, plain, shard_name, write_json
from optx.checkpoint.hf import INDEX
from optx.checkpoint.mapping import Row, expand
from optx.checkpoint.source import FamilyOf, Source, build
from optx.errors import CheckpointError, FormatError
from optx.formats import Float4, Format
from optx.nn import Fused
from optx.nn.core import Linear
from optx.tensor import QTensor, is_qtensor

NOTES = "optx_export.json"
TOGETHER = (("q", "k", "v"), ("gate", "up"), ("q_a", "kv_a"))  # readers join their weights: one outer scale
DENSE = "or export the weights dense with format 'hf'"


def write_compressed_tensors(
    source: Source, folder: Path, family_of: FamilyOf, *, overwrite: bool = False, shard: int = SHARD
) -> Path:
    """config.json with `quantization_config`, safetensors and the tokenizer, all or nothing. Memory holds one shard.

    Raises CheckpointError for a model without a packed weight, a format or a cache that such a checkpoint cannot hold, a change
    that config.json cannot express, and an occupied folder.
    """
    where = f"{source.origin.name}: cannot be written as a compressed-tensors checkpoint"
    if source.origin.kind == "module":
        raise CheckpointError(f"{where}: a module built in memory has no config")
    expected, family = build(source.origin, family_of, source.origin.name)
    tree = unfused(source.tree)
    _check_caches(tree, where)
    check_expressible(plain(_weight_only(tree)), expected, where)
    rows = {row.path: row for row in expand(family.ROWS, len(expected.layers))}
    config = hf_config(source, family.HF_TYPES, where) | {"quantization_config": quantization_config(tree, rows, where)}
    changed: dict[str, float] = {}
    with atomic_folder(folder, overwrite) as partial:
        write_json(partial / "config.json", config)
        _write_shards(partial, _named(source, rows, where, changed), shard)
        write_json(partial / NOTES, {"encoded_again": changed, "meaning": "rms of the change / rms of the weight"})
        if source.tokenizer is not None:
            source.tokenizer.save(partial)
    return folder


def encoded_again(folder: Path) -> dict[str, float]:
    """Of such an export: module -> rms of what encoding it again changed, over the rms of its weights."""
    return json.loads((folder / NOTES).read_text(encoding="utf-8"))["encoded_again"]


def quantization_config(tree: nnx.Module, rows: dict[str, Row], where: str) -> dict[str, Any]:
    """What config.json says of an unfused tree, abstract or not. Raises CheckpointError naming the site."""
    groups: dict[str, tuple[Scheme, list[str]]] = {}
    ignored = ["lm_head"]
    for path, variable in ir.params(tree).items():
        value, row = variable.get_value(), rows[path]
        if is_qtensor(value):
            scheme = scheme_at(path, value, row, _activations(tree, path), where)
            key = json.dumps(scheme.group([]), sort_keys=True)
            groups.setdefault(key, (scheme, []))[1].extend(_modules(row, value.shape))
        elif row.kind in MATRICES and value.ndim > 1:
            ignored += [name for name in _modules(row, value.shape) if name not in ignored]
    if not groups:
        raise CheckpointError(f"{where}: no weight is packed; compile it with quantize_weights, {DENSE}")
    schemes = [scheme for scheme, _ in groups.values()]
    formats = {scheme.format for scheme in schemes}
    only = len(schemes) == 1  # then the class of the modules is a target that readers of experts look for by that name
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": scheme.group(["Linear"] if only else names)
            for i, (scheme, names) in enumerate(groups.values())
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def scheme_at(path: str, weight: QTensor, row: Row, activations: Format | None, where: str) -> Scheme:
    """The scheme of a packed weight. Raises CheckpointError naming the site and the way out."""
    site = f"{where}: {path} is {weight.format}{list(weight.shape)}"
    make = SCHEMES.get(type(weight.format))
    if make is None:
        raise CheckpointError(
            f"{site}; such a checkpoint holds int4, int8, fp8_e4m3, fp8_block, mxfp4 and nvfp4; "
            f"compile from dense weights to one of them, {DENSE}"
        )
    if row.kind not in MATRICES or weight.axis != -2:
        raise CheckpointError(
            f"{site} in a layout that only the model's own files have ({', '.join(row.patterns)}); "
            f"leave it dense by 'match' in the recipe, {DENSE}"
        )
    try:
        return make(weight, activations)
    except FormatError as error:
        raise CheckpointError(f"{site}: {error}, {DENSE}") from None


def _linear(w: QTensor, row: Row) -> Iterator[QTensor]:
    yield w


def _experts(w: QTensor, row: Row) -> Iterator[QTensor]:
    count = len(row.patterns)
    each = w.shape[-1] // count
    for e in range(w.shape[0]):
        expert = jax.tree.map(lambda part, e=e: part[e], w)
        for i in range(count):
            yield tensor.columns(expert, i * each, each)


MATRICES = {"linear": _linear, "experts": _experts}  # kind of a row -> its matrices, in the order of the row's names


def _modules(row: Row, shape: tuple[int, ...]) -> list[str]:
    """Names of the modules that hold the row's parameter, as transformers calls them."""
    return [name.removesuffix(".weight") for name in row.names("hf", shape)]


def _named(source: Source, rows: dict[str, Row], where: str, changed: dict[str, float]):
    """(name, array) of every tensor, block by block; `changed` takes what had to be encoded again."""
    for prefix, block in source.blocks():
        block, packed = unfused(block), {}
        for path, variable in ir.params(block).items():
            value, row = variable.get_value(), rows[f"{prefix}/{path}"]
            if is_qtensor(value):
                matrices = zip(_modules(row, value.shape), MATRICES[row.kind](value, row), strict=True)
                packed[path] = dict(matrices)
                continue
            array = np.asarray(jax.device_get(value))
            for name, part in row.parts(array, ir.get(block, path.rpartition("/")[0])).items():
                yield name, np.ascontiguousarray(part)
        for path, matrices in _with_one_outer(packed, changed).items():
            full = f"{prefix}/{path}"
            scheme = scheme_at(full, ir.get(block, path).get_value(), rows[full], _activations(block, path), where)
            for name, matrix in matrices.items():
                for last, part in scheme.tensors(matrix).items():
                    yield f"{name}.{last}", np.ascontiguousarray(part)


def _with_one_outer(packed: dict[str, dict[str, QTensor]], changed: dict[str, float]) -> dict[str, dict[str, QTensor]]:
    """The same with nvfp4 under outer scales that are one a tensor and one of what readers join."""
    joined: dict[Any, list[tuple[str, str]]] = {}
    for path, matrices in packed.items():
        owner, _, part = path.removesuffix("/weight").rpartition("/")
        team = next((team for team in TOGETHER if part in team), part)
        for name, matrix in matrices.items():
            if isinstance(matrix.format, Float4) and matrix.format.kind == "nv":
                expert = name.rpartition(".")[0] if len(matrices) > 1 else ""  # its gate and up are joined, by expert
                joined.setdefault((owner, team, expert), []).append((path, name))
    out = {path: dict(matrices) for path, matrices in packed.items()}
    for places in joined.values():
        before = [packed[path][name] for path, name in places]
        for (path, name), old, new in zip(places, before, one_outer(before), strict=True):
            out[path][name] = new
            if new is not old:
                changed[name] = _distance(old, new)
    return out


def _distance(old: QTensor, new: QTensor) -> float:
    was, now = values(old), values(new)
    return float(jnp.sqrt(jnp.sum((now - was) ** 2) / jnp.maximum(jnp.sum(was**2), 1e-30)))


def _activations(tree: nnx.Module, path: str) -> Format | None:
    owner = ir.get(tree, path.rpartition("/")[0])
    return owner.activations if isinstance(owner, Linear) else None


def unfused(module: nnx.Module) -> nnx.Module:
    """A copy of a tree or block with nothing joined, in the form that its weights have."""
    out = ir.shallow(module)
    for path in [path for path, part in ir.walk(out) if isinstance(part, Fused)]:
        ir.put(out, path, ir.get(out, path).unfused())
    return out


def _weight_only(tree: nnx.Module) -> nnx.Module:
    """A copy that leaves activations as they are: the file's schemes speak of them."""
    out = ir.shallow(tree)
    for _, part in ir.walk(out):
        if isinstance(part, Linear):
            part.activations = None
    return out


def _check_caches(tree: nnx.Module, where: str) -> None:
    for path, part in ir.walk(tree):
        for value in vars(part).values():
            if isinstance(value, CacheSpec) and value.packed:
                raise CheckpointError(
                    f"{where}: {path} keeps its cache in {value.storage} with a scale a token, where kv_cache_scheme has one a "
                    "tensor; compile without the recipe's cache stage and choose the cache where the model is served"
                )


def _write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard: int) -> None:
    """Safetensors files of at most `shard` bytes (one tensor at least), with an index when there are several."""
    files: list[list[str]] = []
    held: Tensors = {}
    total = size = 0

    def flush():
        path = folder / f"part-{len(files)}"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
        files.append(list(held))
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > shard:
            flush()
            size = 0
        held[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    final = [shard_name(i, len(files)) for i in range(len(files))]
    for i, name in enumerate(final):
        (folder / f"part-{i}").rename(folder / name)
    if len(final) > 1:
        table = {tensor_: file for names, file in zip(files, final, strict=True) for tensor_ in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
