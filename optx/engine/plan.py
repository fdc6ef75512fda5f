"""What the scheduler hands on: one dispatch, row by row."""

import dataclasses
from typing import NamedTuple

import numpy as np

from optx.engine.compaction import Compaction
from optx.engine.pages import Copy
from optx.engine.request import Request


class Part(NamedTuple):  # of which a tick makes as many as it has rows: a third of a frozen dataclass's time
    """One row of a dispatch. rounds: tokens that it draws, 0 for a chunk before a prompt's last."""

    request: Request
    row: int
    start: int  # position of its first token
    tokens: list[int]  # [-1]: its newest, which the device holds; then drafts, -1 where the device makes them
    rounds: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One dispatch. Compactions and copies come first."""

    parts: tuple[Part, ...]  # by row
    writes: tuple[np.ndarray, ...]  # by group: flat slots of the tokens, part after part; of one token each in rounds
    copies: tuple[Copy, ...]
    compactions: tuple[Compaction, ...]
    ticks: int  # of one token a row each; 1 with prompt tokens
    chunk: bool  # there are prompt tokens
    mixed: bool  # they lie among the other rows' tokens; else they are those of one row
    alone: bool  # the batch is one row
    width: int = 1  # of decodes: tokens a row, its newest and drafts to verify
