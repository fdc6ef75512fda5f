"""Dense Hugging Face checkpoints: what transformers and every other reader of safetensors takes.

Joined projections are split, packed weights dequantized, names are those of the family's rows. A recipe's choices that
live at run time only (how the KV cache is stored) stay behind; one that changes the model's function beyond what
config.json can say is refused.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from optx import ir, tensor
from optx.cache import CacheSpec
from optx.checkpoint.export import atomic_folder, umask
from optx.checkpoint.hf import INDEX
from optx.checkpoint.mapping import expand
from optx.checkpoint.source import FamilyOf, Source, build
from optx.errors import CheckpointError
from optx.nn import Fused

SHARD = 5 * 10**9  # bytes of a file, as transformers writes them


def write_hf(source: Source, folder: Path, family_of: FamilyOf, *, overwrite: bool = False, shard: int = SHARD) -> Path:
    """config.json, model.safetensors (above `shard` bytes several with an index) and the tokenizer, all or nothing.

    Weights are read block by block; memory holds one shard. Raises CheckpointError for a module without a config, for a
    change that the config cannot express and for an occupied folder.
    """
    where = f"{source.origin.name}: cannot be written as a Hugging Face checkpoint"
    if source.origin.kind == "module":
        raise CheckpointError(f"{where}: a module built in memory has no config")
    expected, family = build(source.origin, family_of, source.origin.name)
    check_expressible(plain(source.tree), expected, where)
    config = hf_config(source, family.HF_TYPES, where)
    names = {row.path: row for row in expand(family.ROWS, len(expected.layers))}
    sizes = {}
    for path, variable in ir.params(expected).items():
        shape, row = variable.get_value().shape, names[path]
        module = ir.get(expected, path.rsplit("/", 1)[0])
        shapes = row.layout.shapes(shape, module, len(row.patterns))
        item = jnp.dtype(variable.get_value().dtype).itemsize
        sizes |= {n: math.prod(s) * item for n, s in zip(row.names("hf", shape), shapes, strict=True)}
    with atomic_folder(folder, overwrite) as partial:
        write_json(partial / "config.json", config)
        write_shards(partial, _named(source, names), sizes, shard)
        if source.tokenizer is not None:
            source.tokenizer.save(partial)
    return folder


def plain(module: nnx.Module) -> nnx.Module:
    """A copy of a tree or block as a dense checkpoint has it: nothing joined, no weight packed, caches in their dtype."""
    out = ir.shallow(module)
    fused = [path for path, part in ir.walk(out) if isinstance(part, Fused)]
    for path in fused:
        ir.put(out, path, ir.get(out, path).unfused())
    for _, part in ir.walk(out):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Variable) and tensor.is_qtensor(value.get_value()):
                dense = tensor.lift(_dequantize, value.get_value())
                setattr(part, name, nnx.Param(dense, axes=value.get_metadata().get("axes")))
            elif isinstance(value, CacheSpec):
                setattr(part, name, value.replace(format=None))
    return out


_dequantize = jax.jit(lambda w: w.dequantize())


def check_expressible(tree: nnx.Module, expected: nnx.Module, where: str) -> None:
    """Raises CheckpointError when `tree` is not what the config builds, naming the first module that differs."""
    mine, its = ({path: next(ir.entries(part)).text for path, part in ir.walk(model)} for model in (tree, expected))
    for path in [*mine, *its]:
        if mine.get(path) != its.get(path):
            raise CheckpointError(
                f"{where}: config.json cannot express what the recipe changed at {path or 'the root'}: "
                f"{its.get(path, 'nothing')} became {mine.get(path, 'nothing')}"
            )


def hf_config(source: Source, classes: dict[str, str], where: str) -> dict:
    """The origin's config with the fields that transformers wants and GGUF headers do not carry."""
    config = source.origin.config
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "factors":
        raise CheckpointError(f"{where}: its rope is a table of frequency factors, which config.json cannot express")
    ends = source.tokenizer.eos_ids if source.tokenizer else ()
    found = {
        "bos_token_id": source.tokenizer.bos_id if source.tokenizer else None,
        "eos_token_id": sorted(ends) if len(ends) > 1 else next(iter(ends), None),
    }
    added = {key: value for key, value in found.items() if value is not None and key not in config}
    config = {"architectures": [classes[config["model_type"]]], **config, **added}
    config.pop("dtype", None)
    config.pop("quantization_config", None)  # what it speaks of is dense now
    return config | {"torch_dtype": source.origin.dtype}  # transformers 4 reads this name, 5 reads it too


def _named(source: Source, names) -> Iterator[tuple[str, np.ndarray]]:
    """(HF name, array as files keep it) of every parameter, block by block."""
    for prefix, block in source.blocks():
        block = plain(block)
        for path, variable in ir.params(block).items():
            row, module = names[f"{prefix}/{path}"], ir.get(block, path.rpartition("/")[0])
            array = np.asarray(jax.device_get(variable.get_value()))
            for name, part in row.parts(array, module).items():
                yield name, np.ascontiguousarray(part)


def write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], sizes: dict[str, int], shard: int) -> None:
    """Safetensors files of at most `shard` bytes (one tensor at least), with an index when there are several.

    sizes: bytes by name, in the order in which the tensors come.
    """
    files = assign(sizes, shard)
    count = max(files.values()) + 1
    for number, group in itertools.groupby(tensors, key=lambda item: files[item[0]]):
        path = folder / shard_name(number, count)
        save_file(dict(group), path, metadata={"format": "pt"})
        path.chmod(0o666 & ~umask())  # safetensors makes files that only their owner can read
    if count > 1:
        table = {name: shard_name(number, count) for name, number in files.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": table})


def assign(sizes: dict[str, int], shard: int) -> dict[str, int]:
    """The number of the file that each tensor goes to, filled in order."""
    files, number, filled = {}, 0, 0
    for name, size in sizes.items():
        if filled and filled + size > shard:
            number, filled = number + 1, 0
        files[name] = number
        filled += size
    return files


def shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
