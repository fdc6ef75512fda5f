"""optx exports: an orbax checkpoint of the compiled weights beside a manifest that can rebuild the tree.

manifest.json   format version, origin (config, dtype, packed formats), recipe, versions, parameters, files' hashes, and
                what the passes took and cost
ir.txt          the compiled tree as text; a reload whose tree prints otherwise is refused
weights/        orbax: one array a part, `layers/0/mixer/q/weight.data`
tokenizer.json, tokenizer_config.json
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from optx import ir, pipeline
from optx.checkpoint.hf import read_json
from optx.checkpoint.source import FamilyOf, Origin, Source, build
from optx.errors import CheckpointError, did_you_mean
from optx.formats import Format, parse
from optx.recipe import Recipe
from optx.tensor import QTensor, is_qtensor, quantize
from optx.tokenizer import Tokenizer

MANIFEST, IR, WEIGHTS = "manifest.json", "ir.txt", "weights"
VERSION = 1


def is_export(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def write_export(
    folder: Path,
    tree: nnx.Module,
    source: Source,
    recipe: Recipe,
    *,
    overwrite: bool,
    report: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the export into a temporary folder beside `folder` and renames it. report: what `optx report` shows of the
    compile (`optx.report.kept`)."""
    if source.origin.kind == "module":
        raise CheckpointError(
            "export: a module built in memory has no config to rebuild it from; export its source model"
        )
    with atomic_folder(folder, overwrite) as partial:
        arrays = flatten(tree)
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / WEIGHTS, arrays)
        manifest = {
            "version": VERSION,
            "origin": dataclasses.asdict(source.origin),
            "recipe": (source.recipe or recipe).to_dict(),
            "versions": {
                name: importlib.metadata.version(name) for name in ("optx", "jax", "flax", "orbax-checkpoint")
            },
            "parameters": {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()},
            "sha256": _digests(partial / WEIGHTS),
            "report": report or {},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        (partial / IR).write_text(ir.describe(tree), encoding="utf-8")
        if source.tokenizer is not None:
            source.tokenizer.save(partial)
    return folder


def open_export(folder: Path, family_of: FamilyOf) -> Source:
    """An export as a source: its tree rebuilt from config and recipe; arrays are restored when the first is read.

    Raises: CheckpointError for another version, a tree that prints otherwise, a manifest that does not fit the tree;
    on reading, for missing or changed arrays.
    """
    where = str(folder / MANIFEST)
    origin, recipe, table, digests = _read_manifest(folder)
    tree = _passes(origin, recipe, family_of, where)[0][-1]
    _check_text(folder, tree)
    want = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in flatten(tree).items()}
    wrong = sorted(name for name in want.keys() | table.keys() if want.get(name) != table.get(name))
    if wrong:
        raise CheckpointError(f"{where}: parameters do not fit the tree: {', '.join(wrong[:5])}")
    tokenizer = Tokenizer.from_hf_dir(folder) if (folder / "tokenizer.json").exists() else None
    arrays = functools.cache(lambda: _restore(folder / WEIGHTS, table, digests))

    def read(path: str):
        value = ir.get(tree, path).get_value()
        return jax.tree.unflatten(jax.tree.structure(value), [arrays()[name] for name in names(path, value)])

    return Source(tree=tree, read=read, origin=origin, tokenizer=tokenizer, recipe=recipe)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """How an export was made, without its weights: the passes run again on shapes, and what its manifest kept of the compile."""

    origin: Origin
    recipe: Recipe
    trees: tuple[nnx.Module, ...]  # before the first pass, after each
    records: tuple[pipeline.Record, ...]  # seconds and errors are the compile's, where `timed`
    timed: bool  # False: the manifest keeps nothing of the compile
    target: str | None  # it was compiled for; None: not kept
    versions: Mapping[str, str]  # of the packages that wrote it
    files: int  # of weights, each with its sha256


def how_made(folder: Path, family_of: FamilyOf) -> Made:
    """Raises: CheckpointError for a folder that is no export, another version, a manifest that is not whole."""
    where = str(folder / MANIFEST)
    if not is_export(folder):
        raise CheckpointError(f"{folder}: no optx export (it has no {MANIFEST}); optx compile --out writes one")
    origin, recipe, _, digests = _read_manifest(folder)
    trees, records = _passes(origin, recipe, family_of, where)
    manifest = read_json(folder / MANIFEST)
    report = manifest.get("report") or {}
    try:
        passes = {row["pass"]: row for row in report.get("passes", ())}
        timed = bool(records) and passes.keys() == {record.name for record in records}
        for record in records if timed else ():
            record.seconds = float(passes[record.name]["seconds"])
            record.errors = {str(path): float(error) for path, error in passes[record.name]["errors"].items()}
            if (measured := passes[record.name].get("quality")) is not None:
                record.quality = pipeline.Quality(**measured)
            if measured := passes[record.name].get("quality"):
                record.quality = pipeline.Quality(**measured)
        target = report.get("target")
        versions = {str(name): str(version) for name, version in manifest.get("versions", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where}: report: not as optx writes it: {error!r}; compile again") from None
    return Made(
        origin=origin,
        recipe=recipe,
        trees=tuple(trees),
        records=tuple(records),
        timed=timed,
        target=target,
        versions=versions,
        files=len(digests),
    )


def _passes(origin: Origin, recipe: Recipe, family_of: FamilyOf, where: str):
    """The recipe's passes on the origin's shapes: `pipeline.run`."""
    dense, _ = build(origin, family_of, where)
    return pipeline.run(with_formats(dense, origin.formats), recipe)


def _read_manifest(folder: Path) -> tuple[Origin, Recipe, dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """Origin, recipe, (shape, dtype) by array, sha256 by file. Raises CheckpointError, RecipeError."""
    where, manifest = str(folder / MANIFEST), read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        got = manifest.get("version") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{where}: export version {got!r}; this optx reads version {VERSION}")
    try:
        origin = Origin(**manifest["origin"])
        np.dtype(origin.dtype)
        table = {name: (tuple(map(int, p["shape"])), str(p["dtype"])) for name, p in manifest["parameters"].items()}
        digests = dict(manifest["sha256"])
        whole = all(
            isinstance(x, kind) for x, kind in ((origin.config, dict), (origin.formats, dict), (origin.dtype, str))
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a whole manifest: {error!r}") from None
    if not whole or "recipe" not in manifest:
        raise CheckpointError(f"{where}: not a whole manifest: its origin or its recipe is missing or of a wrong type")
    return origin, Recipe.from_dict(manifest["recipe"], f"{where}: recipe"), table, digests


def with_formats(tree: nnx.Module, formats: Mapping[str, str]) -> nnx.Module:
    """A dense abstract tree with the parameters that the file kept packed in their formats."""
    out = ir.shallow(tree)
    parameters = ir.params(out)
    for path, text in formats.items():
        owner, _, last = path.rpartition("/")
        variable = parameters.get(path)
        if variable is None:
            raise CheckpointError(f"the file's packed parameters: nothing at {path!r}{did_you_mean(path, parameters)}")
        axis = -1 if path == "embed/table" else -2
        packed = _abstract(variable.get_value(), parse(str(text)), axis)
        setattr(ir.get(out, owner), last, nnx.Param(packed, axes=variable.get_metadata().get("axes")))
    return out


def _abstract(like: jax.ShapeDtypeStruct, format_: Format, axis: int) -> QTensor:
    if format_.can_encode:
        return quantize(like, format_, axis)
    length = like.shape[axis]
    rows = like.shape if axis == -1 else like.shape[::-1]
    data = jax.ShapeDtypeStruct((*rows[:-1], format_.packed(length)), np.uint8)
    return QTensor(data=data, format=format_, length=length, axis=axis, dtype=like.dtype)


def flatten(tree: nnx.Module) -> dict[str, jax.Array]:
    """Every array of the tree by `path` or `path.part`."""
    arrays = {}
    for path, variable in ir.params(tree).items():
        value = variable.get_value()
        arrays |= dict(zip(names(path, value), jax.tree.leaves(value), strict=True))
    return arrays


def names(path: str, value) -> list[str]:
    """Names of a parameter's arrays, in the order of its leaves."""
    if not is_qtensor(value):
        return [path]
    return [f"{path}.{part}" for part in ("data", "scale", "zero") if getattr(value, part) is not None]


def _restore(weights: Path, table, digests: Mapping[str, str]) -> dict[str, Any]:
    # Files are checked first: what orbax says of a damaged one is a bare Exception and pages of log.
    found = _digests(weights)
    for label, names_ in (
        ("missing", digests.keys() - found.keys()),
        ("left over", found.keys() - digests.keys()),
        ("changed", {name for name in digests.keys() & found.keys() if digests[name] != found[name]}),
    ):
        if names_:
            raise CheckpointError(
                f"{weights}: damaged, by the hashes of {MANIFEST}: {label}: {', '.join(sorted(names_)[:5])}"
            )
    abstract = {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype) in table.items()}
    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore(weights.resolve(), abstract)
    except (ValueError, KeyError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{weights}: damaged or incomplete: {first}") from None


def _checkpointer():
    """Imported here: orbax takes as long to import as optx does."""
    import orbax.checkpoint

    return orbax.checkpoint.StandardCheckpointer()


def _check_text(folder: Path, tree: nnx.Module) -> None:
    now = ir.describe(tree)
    try:
        stored = (folder / IR).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / IR}: cannot be read: {error}") from None
    if stored != now:
        line = next(
            (pair for pair in zip(stored.splitlines(), now.splitlines(), strict=False) if pair[0] != pair[1]), ("", "")
        )
        raise CheckpointError(
            f"{folder / IR}: this optx builds another tree from the export's config and recipe; "
            f"stored {line[0].strip()!r}, now {line[1].strip()!r}"
        )


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its path there."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError when something that may not be overwritten stands at `folder`."""
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: exists and is not empty; choose another folder, or overwrite it (--overwrite, overwrite=True)"
        )


class atomic_folder:
    """A folder that appears whole or not at all: written beside its place under another name, then renamed."""

    def __init__(self, folder: Path, overwrite: bool = False):
        self.folder, self.overwrite = folder, overwrite

    def __enter__(self) -> Path:
        check_free(self.folder, self.overwrite)
        name = f".{self.folder.name}.partial-"
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.partial = Path(tempfile.mkdtemp(prefix=name, dir=self.folder.parent.resolve()))
            os.chmod(self.partial, 0o777 & ~umask())
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written: {error.strerror}") from None
        return self.partial

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._put()
        except OSError as failure:
            raise CheckpointError(f"{self.folder}: cannot be written: {failure.strerror}") from None
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def _put(self) -> None:
        """Renames the finished folder to its place; what stood there comes back when that fails."""
        if not self.folder.exists():
            self.partial.rename(self.folder)
            return
        old = self.partial.with_name(self.partial.name + "-old")
        self.folder.rename(old)
        try:
            self.partial.rename(self.folder)
        except OSError:
            old.rename(self.folder)
            raise
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
