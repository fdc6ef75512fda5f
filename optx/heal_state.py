"""What a training has done so far, kept in a folder, so that one that was killed goes on as if it had not been.

`steps/` holds the newest checkpoints (orbax), `log.jsonl` a line a step and a measurement, `healed/` and `result.json` the end.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from optx import strict
from optx.errors import HealError
from optx.pipeline import Healing

LOG, RESULT, CURVES = "log.jsonl", "result.json", "curves.png"
KEPT = 2  # checkpoints: the newest may be torn when a machine dies
Arrays = Mapping[str, Any]


def _orbax():
    import orbax.checkpoint  # a third of a second, which every verb would pay

    return orbax.checkpoint


class State:
    """The folder of one training. Raises HealError where it cannot be written."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HealError(f"heal: {folder}: cannot be written: {error.strerror}") from None
        self._log = None

    @functools.cached_property
    def _manager(self):
        options = _orbax().CheckpointManagerOptions(max_to_keep=KEPT)
        return _orbax().CheckpointManager(self.folder / "steps", options=options)

    def result(self) -> Healing | None:
        """Of a training that has ended."""
        path = self.folder / RESULT
        return strict.load(Healing, json.loads(path.read_text(encoding="utf-8")), str(path)) if path.exists() else None

    def facts(self) -> dict[str, Any] | None:
        """What was kept beside the arrays of the newest checkpoint; None: there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        return self._manager.restore(step, args=_orbax().args.Composite(facts=_orbax().args.JsonRestore())).facts

    def arrays(self, like: Arrays) -> Arrays:
        """Those of the newest checkpoint, with shapes, types and places of `like`."""
        args = _orbax().args.Composite(arrays=_orbax().args.StandardRestore(_named(like)))
        return _unnamed(self._manager.restore(self._manager.latest_step(), args=args).arrays, like)

    def save(self, step: int, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Appears whole or not at all; written while training goes on."""
        args = {"arrays": _orbax().args.StandardSave(_named(arrays)), "facts": _orbax().args.JsonSave(dict(facts))}
        self._manager.save(step, args=_orbax().args.Composite(**args), force=True)

    def begin(self, step: int) -> None:
        """Opens the log behind the lines of steps up to `step`; what a run wrote after its last checkpoint is dropped."""
        path = self.folder / LOG
        kept = [row for row in rows(path) if row["step"] <= step] if path.exists() else []
        path.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        self._log = path.open("a", encoding="utf-8")  # stays open while training runs

    def log(self, **row) -> None:
        self._log.write(f"{json.dumps(row)}\n")
        self._log.flush()

    def finish(self, values: Arrays, healing: Healing) -> None:
        """Keeps what moved, and drops the checkpoints."""
        self._close()
        with _orbax().StandardCheckpointer() as writer:
            writer.save(self.folder / "healed", _named(values), force=True)
        whole = self.folder / f"{RESULT}.new"
        whole.write_text(json.dumps(dataclasses.asdict(healing), indent=1), encoding="utf-8")
        whole.replace(self.folder / RESULT)
        shutil.rmtree(self.folder / "steps", ignore_errors=True)

    def healed(self, like: Arrays) -> Arrays:
        """What moved, of a training that has ended."""
        with _orbax().StandardCheckpointer() as reader:
            return _unnamed(reader.restore(self.folder / "healed", _named(like)), like)

    def _close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
        self._log.close()


def rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; one that was torn in writing is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _named(arrays: Arrays) -> list:
    """Leaves alone: names hold slashes, which orbax would take for folders."""
    return jax.tree.leaves(arrays)


def _unnamed(leaves: list, like: Arrays) -> Arrays:
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
