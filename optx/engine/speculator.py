"""The host's side of speculation: whether a tick verifies drafts, how many a row, and which where the text gives them."""

from collections.abc import Iterable

import numpy as np

from optx.engine.ngram import History
from optx.engine.request import Request
from optx.engine.speculation import Governor, Speculation, prior_cost


class Speculator:
    """Drafts for the rows of a decode tick. A row whose tokens the host must see one by one gets none."""

    def __init__(self, how: Speculation, share: float = 0.0):
        """share: bytes that one draft reads, of those that a plain tick reads."""
        self.how = how
        self.width = how.tokens + 1  # tokens a row of a verify tick
        self.governor = Governor(how, prior_cost(how, share))
        self._texts: dict[Request, History] = {}

    def wants(self, rows: int) -> bool:
        """Whether the next decode tick should verify drafts."""
        return self.governor.wants(rows)

    def offer(self, requests: Iterable[Request]) -> dict[Request, list[int]]:
        """Drafts of the requests that get any: token ids, or -1 for those that the device will draft."""
        self._texts = {request: text for request, text in self._texts.items() if request.finish is None}
        offered = {}
        for request in requests:
            most = 0 if request.watched else min(self.how.tokens, request.left - 1)
            if most > 0 and (drafts := self._draft(request, most)):
                offered[request] = drafts
        return offered

    def _draft(self, request: Request, count: int) -> list[int]:
        if self.how.method != "ngram":
            return [-1] * count
        text = self._texts.get(request)
        if text is None:
            text = self._texts[request] = History(request.prompt)
        text.extend(request.output[text.size - len(request.prompt) :])
        return np.asarray(text.draft(count, self.how.least)).tolist()

    def decided(self) -> None:
        """A dispatch was planned by what `wants` said."""
        self.governor.asked += 1

    def landed(self, rows: int, tokens: int) -> None:
        """What a tick that should verify drafts gave, all rows together."""
        self.governor.verified(rows, tokens)

    def took(self, drafted: bool, rows: int, seconds: float) -> None:
        self.governor.took(drafted, rows, seconds)
