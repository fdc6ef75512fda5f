"""What a model is healed on: text files, token shards and what heal_sample.py adds, as sequences of one length."""

import contextlib
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from optx import evaluate
from optx.errors import HealError, no_such_path
from optx.passes.distill import Distill

SHARD = ".npy"


class Batches(Protocol):
    """int32[batch, context] without end, from a state that JSON can hold."""

    def __next__(self) -> np.ndarray: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@contextlib.contextmanager
def bar(name: str, total: float, shown: bool) -> Iterator[Callable]:
    """A line of progress with the time that is left: advance(by, text to show beside it)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    told = TextColumn("{task.fields[told]}")
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), told)
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(name, total=total, told="")
        yield lambda by, told="": progress.update(task, advance=by, told=told)


def files(options: Distill) -> list[Path]:
    """The text files and token shards. Raises HealError for one that is not there."""
    paths = [Path(name).expanduser() for name in options.text]
    for path in paths:
        if not path.is_file():
            raise HealError(f"distill.text: {no_such_path(path)}")
    return paths


def check_reader() -> None:
    """Raises HealError where grain is not installed."""
    if importlib.util.find_spec("grain") is None:
        raise HealError("healing reads its text through grain, which is missing: pip install 'optx[heal]'")


def digests(options: Distill) -> list[str]:
    """Of the content of all files."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files(options)]


def sequences(source, options: Distill, sampled: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(int32[n, context] to train on, int32[held_out, context] to measure on, spread evenly over all), cut as `optx.evaluate`
    cuts windows: each begins with the model's first token where it has one.

    sampled: int32[n, length], what the model wrote. Raises HealError for text that does not fill a batch beside the held-out
    sequences, and for token ids that the model does not have.
    """
    first, streams = first_token(source), texts(source, options)
    room = options.context - (first is not None)
    rows = [
        window
        for stream in streams
        for window, _ in evaluate.windows_of(stream.tolist(), options.context, room, first)
        if len(window) == options.context
    ] + ([] if sampled is None else sampled.tolist())
    needed = options.batch + options.held_out
    if len(rows) < needed:
        raise HealError(
            f"distill.text: {sum(map(len, streams)):,} tokens and {options.sample} sampled sequences make {len(rows)} sequences "
            f"of {options.context}; a batch of {options.batch} and {options.held_out} held-out ones need {needed}: give more "
            "text, a sample, or less context"
        )
    held = np.linspace(0, len(rows) - 1, options.held_out).round().astype(int)
    table = np.asarray(rows, np.int32)
    return np.delete(table, held, axis=0), table[held]


def first_token(source) -> int | None:
    """What every text of the model begins with; None: nothing."""
    return source.tokenizer.bos_id if source.tokenizer is not None and source.tokenizer.add_bos else None


def texts(source, options: Distill) -> list[np.ndarray]:
    """int[T] of each file."""
    vocab = source.tree.embed.table.get_value().shape[0]
    return [_tokens(path, path.stat().st_mtime_ns, source.tokenizer, vocab) for path in files(options)]


@functools.lru_cache(maxsize=8)
def _tokens(path: Path, changed: int, tokenizer, vocab: int) -> np.ndarray:
    """int[T] of a file."""
    if path.suffix == SHARD:
        return _shard(path, vocab)
    if tokenizer is None:
        raise HealError(f"distill.text: {path}: the model has no tokenizer; give token shards ({SHARD})")
    try:
        return _checked(np.asarray(tokenizer.encode(path.read_text(encoding="utf-8"), add_special=False)), path, vocab)
    except UnicodeDecodeError as error:
        raise HealError(f"distill.text: {path}: not UTF-8 at byte {error.start:,}; convert it with iconv") from None


def _shard(path: Path, vocab: int) -> np.ndarray:
    try:
        found = np.load(path)
    except (OSError, ValueError) as error:
        raise HealError(f"distill.text: {path}: no array that numpy can read: {error}") from None
    if not np.issubdtype(found.dtype, np.integer):
        raise HealError(f"distill.text: {path}: {found.dtype}; allowed: token ids, whole numbers of any width")
    return _checked(found.reshape(-1), path, vocab)


def _checked(ids: np.ndarray, path: Path, vocab: int) -> np.ndarray:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise HealError(
            f"distill.text: {path}: token ids {ids.min()} to {ids.max()}; the model's are 0 to {vocab - 1}: the shard "
            "belongs to another tokenizer"
        )
    return ids


def batches(rows: np.ndarray, options: Distill) -> Batches:
    """Batches of rows in a shuffled order, epoch after epoch, through grain."""
    import grain

    shuffled = grain.MapDataset.source(rows).seed(options.seed).shuffle().repeat()
    batched = shuffled.batch(options.batch, drop_remainder=True)
    return iter(batched.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
