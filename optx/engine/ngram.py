"""Drafts from the text itself: what followed the last time that it ended like this (prompt lookup)."""

import numpy as np

LONGEST = 8  # tokens at the end of the text that are compared, at most


class History:
    """Tokens of one request, growing."""

    def __init__(self, tokens: list[int]):
        self.size = len(tokens)
        self._tokens = np.empty(max(2 * self.size, 64), np.int32)
        self._tokens[: self.size] = tokens

    def extend(self, tokens: list[int]) -> None:
        need = self.size + len(tokens)
        if need > len(self._tokens):
            self._tokens = np.resize(self._tokens, 2 * need)
        self._tokens[self.size : need] = tokens
        self.size = need

    def draft(self, count: int, least: int) -> np.ndarray:
        """int32[count], or empty: what followed the latest of the earlier places that share the longest end with the text.

        least: tokens that must agree. A continuation that reaches the end of the text goes on from its own start, as a text
        that repeats itself does.
        """
        text, last = self._tokens[: self.size], self.size - 1
        places = np.flatnonzero(text[:-1] == text[-1])
        agree = 1
        while places.size and agree < LONGEST:
            longer = places[places >= agree]
            longer = longer[text[longer - agree] == text[last - agree]]
            if not longer.size:
                break
            places, agree = longer, agree + 1
        if not places.size or agree < least:
            return np.empty(0, np.int32)
        return np.resize(text[places[-1] + 1 :], count)
