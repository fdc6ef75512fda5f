"""What a request's grammar allows next, as the device wants it."""

from typing import Protocol, runtime_checkable

import numpy as np

from optx.errors import RequestError


class Matcher(Protocol):
    """How far one answer has come in a grammar over token ids."""

    def mask(self) -> np.ndarray: ...  # uint32[words]: token i may come next where bit i % 32 of word i // 32 is set

    def accept(self, token: int) -> None: ...

    @property
    def done(self) -> bool: ...  # the answer is complete and nothing but an end token may follow

    @property
    def reason(self) -> str: ...  # why nothing may follow an answer that is not complete


@runtime_checkable
class Grammar(Protocol):
    """What answers may look like; `optx.Grammar` makes them."""

    def matcher(self) -> Matcher: ...


class Constraint:
    """One answer's place in its grammar. `accept` takes every token of the answer once, in order, whatever becomes of the
    request's row meanwhile."""

    def __init__(self, grammar: Grammar, vocab: int):
        """vocab: of the model, which may have more rows than the tokenizer has tokens, or fewer.

        Raises RequestError where not even a first token is allowed.
        """
        self._matcher, self._vocab = grammar.matcher(), vocab
        self.mask = self._mask()  # uint32[ceil(vocab / 32)] of the next token
        if not self.mask.any():
            raise RequestError(f"sampling.grammar: {self.reason}; change the grammar")

    def accept(self, token: int) -> None:
        self._matcher.accept(token)
        if not self.done:
            self.mask = self._mask()

    @property
    def done(self) -> bool:
        """Whether the answer is complete: nothing but an end token could follow."""
        return self._matcher.done

    @property
    def stuck(self) -> bool:
        """Whether no token may follow although the answer is not complete."""
        return not self.done and not self.mask.any()

    @property
    def reason(self) -> str:
        return self._matcher.reason or f"no token among the model's {self._vocab} may come next"

    def _mask(self) -> np.ndarray:
        words = np.zeros(-(-self._vocab // 32), np.uint32)
        given = self._matcher.mask()[: len(words)]
        words[: len(given)] = given
        if self._vocab % 32:
            words[-1] &= np.uint32((1 << self._vocab % 32) - 1)
        return words
