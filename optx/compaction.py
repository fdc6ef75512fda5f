"""Compaction of conversations: when a prompt passes a threshold, its old turns are replaced by a summary of them.

    system, turn 1 ... turn n   ->   system, summary of turns 1 ... n - k, turn n - k + 1 ... turn n

A turn is a message of the user with the answers that follow it. System messages at the start and the newest k turns stay word for
word. What results is a new, shorter prompt: its tokens have the positions 0, 1, 2 ... of any prompt, and of the old one's cache
it uses the pages of what both begin with, at most. Nothing here runs a model: a `Talk` says what to summarise and is given
summaries, so that a thread and an event loop can both drive it.
"""

import bisect
import collections
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence

from optx.errors import RequestError
from optx.generate import Message, encode_chat
from optx.tokenizer import Tokenizer

LEAST = 32  # tokens of a threshold
MOST_SUMMARY = 512  # tokens of a summary, unless said otherwise
KEPT = 1024  # summaries that are remembered for clients that send the whole conversation again
REQUEST = (
    "Summarize our conversation so far in at most {words} words, so that you can go on from the summary alone. Keep names, "
    "numbers, decisions, wishes and open questions. Write the summary and nothing else."
)
HEADING = "Summary of our conversation so far:\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compaction:
    """When the old turns of a conversation are summarised, and how."""

    at: int  # tokens of the prompt above which they are
    keep_turns: int = 2  # newest turns that stay word for word, the one to be answered among them
    summary_tokens: int | None = None  # a summary's most; None: a quarter of `at`, up to MOST_SUMMARY
    request: str = REQUEST  # what asks the model for a summary; {words} stands for half as many as it may have tokens
    summarize: Callable[[Sequence[Message]], str] | None = None  # messages -> summary; None: the model itself is asked

    def __post_init__(self):
        for name, least in (("at", LEAST), ("keep_turns", 1), ("summary_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"compaction.{name}: got {value}; allowed: at least {least}")

    @property
    def most(self) -> int:
        """Tokens of a summary, at most."""
        return self.summary_tokens or min(self.at // 4, MOST_SUMMARY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What a client is told of a compaction. Counts are of the whole prompt in the chat template."""

    messages_before: int
    messages_after: int
    tokens_before: int
    tokens_after: int
    summary: str  # "" where it failed
    summary_tokens: int  # that the model generated for it
    reused: bool = False  # the summary was made for an earlier request
    failed: str | None = None  # why the conversation was left as it is


class Compactor:
    """Compactions for one tokenizer, with the summaries made so far. Safe to use from several threads."""

    def __init__(self, how: Compaction, tokenizer: Tokenizer | None, context: int):
        """context: of the engine. Raises RequestError where no summary could be asked for or made use of."""
        self.how, self.tokenizer, self.context = how, tokenizer, context
        if tokenizer is None or tokenizer.chat_template is None:
            lacks = "tokenizer" if tokenizer is None else "chat template"
            raise RequestError(
                f"compaction: the model has no {lacks}, so it has no conversations and cannot be asked for a summary; take a "
                "chat model, or leave compaction out"
            )
        self.check(how)
        self.joined = self._joined()
        self._summaries: collections.OrderedDict[bytes, str] = collections.OrderedDict()
        self._lock = threading.Lock()

    def check(self, how: Compaction) -> None:
        """Raises RequestError for a threshold that leaves no room in the context."""
        if how.at >= self.context:
            raise RequestError(
                f"compaction.at: got {how.at}; allowed: {LEAST} to {self.context - 1}, below the context"
            )
        if how.most >= how.at:
            raise RequestError(f"compaction.summary_tokens: got {how.most}; allowed: 1 to {how.at - 1}, below `at`")

    def _joined(self) -> bool:
        """Whether a summary has to stand in the message after it: templates may insist on user and assistant in turns."""
        marks = [{"role": role, "content": f"<{i}>"} for i, role in enumerate(("user", "user", "assistant", "user"))]
        for joined, messages in ((False, marks), (True, marks[1:])):
            try:
                said = self.tokenizer.chat(messages)
            except RequestError as error:
                refused = str(error)
                continue
            if all(message["content"] in said for message in messages):
                return joined
            refused = "the template leaves messages out"
        raise RequestError(
            f"compaction: the model's chat template does not take a conversation of several turns ({refused}), so it cannot be "
            "asked for a summary; mend the template, or leave compaction out"
        )

    def talk(
        self,
        messages: Sequence[Message],
        ids: list[int],
        variables: Mapping[str, object],
        how: Compaction | None = None,
    ) -> "Talk | None":
        """The compaction of a conversation whose prompt is `ids`; None where it is below the threshold or has no old turns.

        how: in place of the compactor's own. Raises RequestError for a threshold that leaves no room.
        """
        how = how or self.how
        self.check(how)
        talk = Talk(self, how, messages, ids, variables)
        return talk if len(ids) > how.at and talk.first < talk.last else None

    def remembered(self, key: bytes) -> str | None:
        with self._lock:
            if key in self._summaries:
                self._summaries.move_to_end(key)
            return self._summaries.get(key)

    def remember(self, key: bytes, summary: str) -> None:
        with self._lock:
            self._summaries[key] = summary
            while len(self._summaries) > KEPT:
                self._summaries.popitem(last=False)


class Talk:
    """One conversation while it is compacted: `next` gives prompts for summaries and takes these, then `messages` and `ids` are
    the compacted conversation's, `event` tells of it."""

    def __init__(self, compactor: Compactor, how: Compaction, messages: Sequence[Message], ids, variables: Mapping):
        self.compactor, self.how, self.whole, self.before = compactor, how, list(messages), list(ids)
        self.variables = dict(variables)
        roles = [message["role"] for message in self.whole]
        self.first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))  # of the old messages
        # Where turns begin, but for the first.
        self.turns = [i for i, role in enumerate(roles) if role == "user" and i > self.first]
        self.last = [self.first, *self.turns][-how.keep_turns :][0]  # where the newest turns begin
        self.cut, self.summary = self.first, ""  # the summary stands for the messages from `first` to `cut`
        self.generated, self.failed = 0, None
        self.asked: list[list[int]] = []  # prompts for summaries, which nobody will use again
        self._goal = self.first  # where the messages end that are being summarised
        self._started = False

    def next(self, text: str | None = None, tokens: int = 0) -> list[int] | None:
        """text, tokens: of the summary that was asked for. -> ids of the prompt for the next one, of up to `how.most` tokens;
        None when there is nothing more to ask. The messages to summarise are `old`.

        Raises RequestError for a turn that is longer than the context, and for what the chat template refuses.
        """
        if not self._started:
            self._started = True
            self._recall()
        if text is not None:
            self._take(text.strip(), tokens)
        if self.failed or self.cut == self.last or (self.cut > self.first and len(self.ids) <= self.how.at):
            return None
        self._goal = self._reach()
        self.asked.append(self._prompt(self._goal))
        return self.asked[-1]

    @property
    def old(self) -> list[Message]:
        """What is to be summarised now, an earlier summary in place of what it stands for."""
        return self._until(self._goal)

    @property
    def messages(self) -> list[Message]:
        return self.whole if self.failed else self._compacted(self.cut)

    @property
    def ids(self) -> list[int]:
        """Of the prompt."""
        return self.before if self.failed else self._encode(self.messages)

    @property
    def event(self) -> Event:
        return Event(
            messages_before=len(self.whole),
            messages_after=len(self.messages),
            tokens_before=len(self.before),
            tokens_after=len(self.ids),
            summary="" if self.failed else self.summary,
            summary_tokens=self.generated,
            reused=not self.asked,
            failed=self.failed,
        )

    def _compacted(self, cut: int) -> list[Message]:
        """The conversation with the summary in place of the messages up to `cut`."""
        lead, rest = self.whole[: self.first], self.whole[cut:]
        if cut == self.first:
            return [*lead, *rest]
        said = HEADING + self.summary
        if self.compactor.joined:
            return [*lead, {**rest[0], "content": f"{said}\n\n{rest[0]['content']}"}, *rest[1:]]
        return [*lead, {"role": "user", "content": said}, *rest]

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return encode_chat(messages, self.compactor.tokenizer, **self.variables)

    def _prompt(self, goal: int) -> list[int]:
        """Asks for a summary of what comes before `goal`. Models that think aloud are told not to: a summary is short."""
        asking = {"role": "user", "content": self.how.request.format(words=self.how.most // 2)}
        variables = self.variables | {"enable_thinking": False}
        return encode_chat([*self._until(goal), asking], self.compactor.tokenizer, **variables)

    def _until(self, goal: int) -> list[Message]:
        """The conversation, with the summary so far, before the message at `goal` of the whole one."""
        return self._compacted(self.cut)[: goal - len(self.whole)]

    def _reach(self) -> int:
        """The most turns that a prompt for a summary has room for."""
        ends = [turn for turn in self.turns if self.cut < turn <= self.last]
        room = self.compactor.context - self.how.most
        count = len(ends)
        if self.how.summarize is None:
            count = bisect.bisect_left(ends, True, key=lambda end: len(self._prompt(end)) > room)
        if count == 0:
            told = f"takes more than the {room} tokens that a prompt for its summary may have"
            raise RequestError(f"messages: a turn of the conversation {told}; shorten it")
        return ends[count - 1]

    def _take(self, text: str, tokens: int) -> None:
        self.generated += tokens
        if not text:
            self.failed = "the summary came back empty"
            return
        self.cut, self.summary = self._goal, text
        if len(self.ids) >= len(self.before):
            self.failed = "the summary is no shorter than what it stands for"
            return
        self.compactor.remember(self._keys()[self.cut], text)

    def _recall(self) -> None:
        """Starts from the summary of most messages that was made before."""
        keys = self._keys()
        for cut in reversed([turn for turn in self.turns if turn <= self.last]):
            if (summary := self.compactor.remembered(keys[cut])) is not None:
                self.cut, self.summary = cut, summary
                return

    def _keys(self) -> list[bytes]:
        """Names of the conversation's beginnings, by their number of messages."""
        rolling = hashlib.sha256(json.dumps(self.variables, sort_keys=True).encode())
        found = [rolling.digest()]
        for message in self.whole:
            rolling.update(json.dumps(message, sort_keys=True).encode())
            found.append(rolling.digest())
        return found
