"""Hugging Face directories: config.json, safetensors (sharded too). Pickles are refused, never opened."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from optx.checkpoint.mapping import Raw
from optx.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}


def read_json(path: Path) -> Any:
    """Raises CheckpointError when the file is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; an HF directory needs config.json and *.safetensors") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of too many digits
        raise CheckpointError(f"{path}: not JSON: {error}") from None


def read_config(path: Path) -> dict:
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: got a {type(config).__name__}; allowed: an object")
    return config


def read_tensors(folder: Path) -> dict[str, Raw]:
    """Every tensor of the directory by name, none read yet.

    Raises: CheckpointError for missing, truncated or pickled files, unknown dtypes and names that occur twice.
    """
    raws: dict[str, Raw] = {}
    for path in _files(folder):
        for name, raw in _open(path).items():
            if name in raws:
                raise CheckpointError(f"{path}: tensor {name} is in {raws[name].where} as well")
            raws[name] = raw
    return raws


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        table = read_json(index)
        shards = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(shards, dict) or not all(map(_is_file_name, shards.values())):
            raise CheckpointError(f"{index}: 'weight_map' must map tensor names to file names in the same directory")
        files = [folder / name for name in sorted(set(shards.values()))]
        absent = [path.name for path in files if not path.exists()]
        if absent:
            raise CheckpointError(f"{folder}: the index names shards that are missing: {', '.join(absent)}")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder}: only pickle files ({', '.join(pickles)}); a pickle can run code and is never loaded: "
                "convert it to safetensors first"
            )
        raise CheckpointError(f"{folder}: no *.safetensors file; its config.json alone can be described and planned")
    return files


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def _open(path: Path) -> dict[str, Raw]:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    # Safetensors begin with the length of a JSON header, whose low byte may well be a pickle's 0x80.
    if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise CheckpointError(f"{path}: a pickle under a safetensors name; it can run code and is never loaded")
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            facts = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
    raws = {}
    for name, (shape, dtype) in facts.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        raws[name] = Raw(
            name=name, shape=shape, dtype=DTYPES[dtype], read=lambda name=name: _tensor(path, name), where=str(path)
        )
    return raws


def _tensor(path: Path, name: str) -> np.ndarray:
    # Opened anew for each tensor: the mapping is released with it, so resident memory does not grow with the file.
    try:
        with safe_open(path, framework="numpy") as file:
            if file.get_slice(name).get_dtype() != "F8_E4M3":
                return file.get_tensor(name)
        return _float8(path, name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot read tensor {name}: {error}") from None


def _float8(path: Path, name: str) -> np.ndarray:
    """numpy has no fp8 of its own, so safetensors gives none: the bytes are read by the file's header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + size + start)
        return np.frombuffer(file.read(end - start), "float8_e4m3fn").reshape(entry["shape"])
