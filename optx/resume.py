"""What a compile has done so far, kept in a folder block by block, so that one that was killed goes on.

Blocks are the bytes of their leaves in the order of the planned tree, which tells shapes and dtypes. A block counts when the
state behind it is written: the file of the state is replaced last, at once.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optx import ir
from optx.calibrate import Feed
from optx.checkpoint.source import Origin, fill
from optx.errors import CheckpointError
from optx.pipeline import Record
from optx.recipe import Recipe

STATE = "state.json"
KEPT = ("seconds", "errors", "notes")  # of a record: what the weights add to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A folder of one compile's blocks. `key` tells compiles apart: a folder of another one is not touched."""

    folder: Path
    key: str

    @classmethod
    def at(cls, folder: str | Path, recipe: Recipe, origin: Origin, windows: Sequence[np.ndarray] = ()) -> "Work":
        """Raises: CheckpointError for a folder that holds another compile's work."""
        told = json.dumps([dataclasses.asdict(origin), recipe.to_dict()], sort_keys=True).encode()
        key = hashlib.sha256(told + b"".join(np.ascontiguousarray(w).tobytes() for w in windows)).hexdigest()
        work = cls(folder=Path(folder), key=key)
        try:
            work.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"work: {folder}: cannot be written: {error.strerror}") from None
        if (found := work._state().get("key", key)) != key:
            raise CheckpointError(
                f"work: {folder} holds the blocks of another compile ({found[:12]}, this one is {key[:12]}: model, recipe or "
                "calibration text differ); give another folder or remove this one"
            )
        return work

    def done(self) -> int:
        """Blocks that are kept."""
        return self._state().get("blocks", 0)

    def keep(self, index: int, block: nnx.Module, records: Sequence[Record], feed: Feed | None) -> None:
        """The block at `index` of the stream, behind all its passes, and what enters the next one."""
        _write(self.folder / f"{index:04d}.bin", _leaves(block))
        state = {"key": self.key, "blocks": index + 1}
        state["records"] = [{name: getattr(record, name) for name in KEPT} for record in records]
        if feed is not None:
            entering = _entering(feed)
            state["feed"] = f"feed-{index % 2}.bin"  # the other one belongs to the state that still stands
            state["entering"] = [[*at, list(x.shape), jnp.dtype(x.dtype).name] for at, x in entering]
            _write(self.folder / state["feed"], [x for _, x in entering])
        whole = self.folder / f"{STATE}.new"
        whole.write_text(json.dumps(state))
        os.replace(whole, self.folder / STATE)

    def block(self, index: int, plan: nnx.Module) -> nnx.Module:
        """The block at `index`, in the form of its abstract tree `plan`."""
        found = iter(_read(self.folder / f"{index:04d}.bin", [(x.shape, x.dtype) for x in _leaves(plan)]))
        values = {
            path: jax.tree.map(lambda _: next(found), variable.get_raw_value())
            for path, variable in ir.params(plan).items()
        }
        return fill(plan, values.__getitem__)

    def restore(self, records: Sequence[Record], feed: Feed | None) -> None:
        """What was known behind the last block that is kept, written into records and feed."""
        state = self._state()
        for record, kept in zip(records, state.get("records", ()), strict=False):
            for name, value in kept.items():
                setattr(record, name, value)
        if feed is None or "feed" not in state:
            return
        shapes = [(tuple(shape), jnp.dtype(dtype)) for *_, shape, dtype in state["entering"]]
        for (chunk, layer, name, *_), x in zip(
            state["entering"], _read(self.folder / state["feed"], shapes), strict=True
        ):
            if layer is None:
                feed.chunks[chunk] = x
            else:
                feed.pools[chunk].setdefault(layer, {})[name] = x

    def remove(self) -> None:
        """Of a compile that has ended: its blocks are in its result."""
        for path in (*self.folder.glob("*.bin"), self.folder / STATE):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _state(self) -> dict:
        path = self.folder / STATE
        return json.loads(path.read_text()) if path.exists() else {}


def _leaves(block: nnx.Module) -> list:
    return [leaf for variable in ir.params(block).values() for leaf in jax.tree.leaves(variable.get_raw_value())]


def _entering(feed: Feed) -> list[tuple[tuple, jax.Array]]:
    """((chunk, layer, name), array): chunks of the buffer, which have no layer, and pools that later layers read."""
    chunks = [((i, None, None), x) for i, x in enumerate(feed.chunks)]
    pools = [
        ((i, layer, name), x)
        for i, of_chunk in enumerate(feed.pools)
        for layer, pool in of_chunk.items()
        for name, x in pool.items()
    ]
    return chunks + pools


def _write(path: Path, leaves: Sequence[jax.Array]) -> None:
    with open(path, "wb") as file:
        for leaf in leaves:
            file.write(np.asarray(leaf).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, shapes: Sequence[tuple[tuple[int, ...], jnp.dtype]]) -> list[jax.Array]:
    data, at, found = path.read_bytes(), 0, []
    sizes = [int(np.prod(shape)) for shape, _ in shapes]
    if (wanted := sum(n * dtype.itemsize for n, (_, dtype) in zip(sizes, shapes, strict=True))) != len(data):
        raise CheckpointError(
            f"work: {path} has {len(data):,} bytes; expected {wanted:,}: remove the folder and start anew"
        )
    for size, (shape, dtype) in zip(sizes, shapes, strict=True):
        found.append(jnp.asarray(np.frombuffer(data, dtype, size, at).reshape(shape)))
        at += size * dtype.itemsize
    return found
