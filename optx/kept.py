"""Results in files, each named by a hash of all that determines it: a run that was killed goes on where it stopped, and a
second one computes only what is new.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optx import strict
from optx.configs import model_names, model_path
from optx.errors import RecipeError


def key(inputs: Mapping[str, Any]) -> str:
    """The name of a result by its inputs, which JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]


def read[T](folder: Path, name: str, kind: type[T]) -> T | None:
    """A result, an instance of the dataclass `kind`, kept earlier; a file that is damaged counts as none."""
    try:
        data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return strict.load(kind, data["result"], name)
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecipeError):
        return None


def write(folder: Path, name: str, result: Any, inputs: Mapping[str, Any]) -> None:
    """Keeps a dataclass beside its inputs. The file appears whole or not at all."""
    path = folder / f"{name}.json"
    data = {"result": dataclasses.asdict(result), "inputs": inputs}
    path.with_suffix(".tmp").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_files(model: str) -> list:
    """Path, size and time of change of each file of a model: of an export, the manifest has the hashes of those in folders."""
    path = Path(model)
    if not path.exists():
        path = model_path(model) if model in model_names() else _snapshot(model)
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _snapshot(name: str) -> Path:
    """The folder that `optx.load` has downloaded a hub id to."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True))
