"""A conversation over an engine: it keeps its messages, and compacts them when they grow too long."""

import dataclasses
from collections.abc import Callable, Sequence

from optx.compaction import Compaction, Compactor, Event, Talk
from optx.engine.engine import Engine
from optx.engine.request import Sampling
from optx.errors import RequestError
from optx.generate import Message, encode_chat, generate
from optx.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer."""

    text: str
    finish: str  # "stop", "length", or "error": its grammar left no token to go on with
    prompt_tokens: int  # of the prompt that it answers, the compacted one where there was a compaction
    compaction: Event | None  # what was compacted before it; None: nothing


class Conversation:
    """Turns of one conversation: `say` adds one and returns the answer.

    With `compaction` the messages are compacted before a turn whose prompt passes its threshold. The turn tells of it, `messages`
    are the compacted ones from then on, and the old prompt's pages leave the prefix cache at once, but for those of the beginning
    that both prompts share. Other requests of the engine advance beside it.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        *,
        messages: Sequence[Message] = (),
        compaction: Compaction | None = None,
        **variables: object,
    ):
        """messages: to begin with, such as one of role "system". variables: of the chat template.

        Raises RequestError where a compaction could not be made: no chat template, a threshold beyond the context.
        """
        self.engine, self.tokenizer, self.variables = engine, tokenizer, variables
        self.messages = list(messages)
        self.compactor = None if compaction is None else Compactor(compaction, tokenizer, engine.context)

    def say(self, text: str, sampling: Sampling = Sampling(), on_text: Callable[[str], None] | None = None) -> Turn:
        """The answer to one more message of the user. Raises RequestError, with the messages as they were."""
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids, event = encode_chat(messages, self.tokenizer, **self.variables), None
        talk = self.compactor and self.compactor.talk(messages, ids, self.variables)
        if talk is not None:
            self._compact(talk)
            messages, ids, event = talk.messages, talk.ids, talk.event
        told = None if on_text is None else lambda _, piece: on_text(piece)
        (answer,) = generate(self.engine, self.tokenizer, [ids], sampling, told)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return Turn(text=answer.text, finish=answer.finish, prompt_tokens=len(ids), compaction=event)

    def _compact(self, talk: Talk) -> None:
        text, tokens = None, 0
        while (prompt := talk.next(text, tokens)) is not None:
            if talk.how.summarize is None:
                (made,) = generate(self.engine, self.tokenizer, [prompt], Sampling(max_tokens=talk.how.most))
                text, tokens = made.text, len(made.token_ids)
            elif not isinstance(text := talk.how.summarize(talk.old), str):
                raise RequestError(f"compaction.summarize: got {type(text).__name__}; allowed: text")
        if not talk.failed:
            for prompt in (talk.before, *talk.asked):
                self.engine.forget(prompt, keep=talk.ids)
