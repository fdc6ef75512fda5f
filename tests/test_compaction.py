"""Compaction: what is summarised and what stays word for word, summaries used again, pages given back; no server."""

import dataclasses

import numpy as np
import pytest
import tiny

import optx
from optx.cache import CacheSpec, Stream
from optx.compaction import HEADING, LEAST, Compaction, Compactor
from optx.engine.pages import PagePool, PageTable
from optx.engine.prefix import PrefixCache
from optx.errors import RequestError
from optx.generate import encode_chat
from optx.tokenizer import Tokenizer

CONTEXT = 640
SYSTEM = {"role": "system", "content": "Be brief."}
# User and assistant in turns, as Gemma's and Mistral's templates insist on.
STRICT = (
    "{% set ns = namespace(user=true) %}{% for m in messages %}{% if m.role == 'system' %}"
    "[{{ m.content }}]{% else %}{% if (m.role == 'user') != ns.user %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.user = not ns.user %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}<assistant>"
)
HALF = "{% for m in messages %}{% if loop.last %}{{ m.role }}{{ m.content }}{% endif %}{% endfor %}"
SPEC = CacheSpec(kind="paged", streams=(Stream(name="k", shape=(1, 8)),))
AT = Compaction(at=150, keep_turns=2)


def tokenizer(template: str | None = tiny.TEMPLATE) -> Tokenizer:
    return Tokenizer(tiny.tokenizer(), eos_ids=[1], chat_template=template)


def turns(count: int, *, lead=(SYSTEM,), size: int = 30) -> list[dict]:
    """`count` turns, the last to be answered, with contents that are all different."""
    found = list(lead)
    for i in range(count):
        found += [{"role": "user", "content": f"u{i} " + "jugs " * (size // 5)}]
        found += [{"role": "assistant", "content": f"a{i} " + "fox " * (size // 4)}] if i < count - 1 else []
    return found


def talk(compactor: Compactor, messages, how=None, **variables):
    ids = encode_chat(messages, compactor.tokenizer, **variables)
    return compactor.talk(messages, ids, variables, how)


def made(compactor: Compactor, messages, *summaries: str, **options):
    """The talk with these summaries, and the texts of the prompts that asked for them."""
    found, asked = talk(compactor, messages, **options), []
    prompt = found.next()
    for summary in summaries:
        asked.append(compactor.tokenizer.decode(prompt, skip_special=False))
        prompt = found.next(summary, len(summary))
    assert prompt is None
    return found, asked


# What is compacted


def test_nothing_happens_up_to_the_threshold_or_without_old_turns():
    messages = turns(4)
    size = len(encode_chat(messages, tokenizer()))
    for at, happens in ((size, False), (size - 1, True)):
        compactor = Compactor(Compaction(at=at), tokenizer(), CONTEXT)
        assert (talk(compactor, messages) is not None) is happens
    compactor = Compactor(AT, tokenizer(), CONTEXT)
    assert talk(compactor, turns(2, size=200)) is None, "both turns are to be kept"
    assert talk(compactor, turns(1, size=200, lead=())) is None
    assert talk(compactor, [SYSTEM, SYSTEM]) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("lead", [(), (SYSTEM,), (SYSTEM, {"role": "system", "content": "Twice."})])
def test_the_system_message_and_the_newest_turns_stay_word_for_word(keep, lead):
    messages = turns(5, lead=lead)
    compactor = Compactor(dataclasses.replace(AT, keep_turns=keep), tokenizer(), CONTEXT)
    found, asked = made(compactor, messages, " short \n")
    kept = messages[-(2 * keep - 1) :]
    assert kept[0] == {"role": "user", "content": kept[0]["content"]} and kept[0]["content"].startswith(f"u{5 - keep} ")
    assert found.messages == [*lead, {"role": "user", "content": HEADING + "short"}, *kept]
    assert messages == turns(5, lead=lead), "the caller's are as they were"
    old = messages[: len(messages) - len(kept)]
    said = "".join(f"<|{m['role']}|>{m['content']}" for m in old)
    assert asked[0].startswith(said + "<|user|>Summarize our conversation so far in at most 18 words")
    assert f"u{5 - keep} " not in asked[0] and asked[0].endswith("<|assistant|>")


def test_the_event_counts_what_was_and_what_is():
    compactor, messages = Compactor(AT, tokenizer(), CONTEXT), turns(5)
    found, _ = made(compactor, messages, "short")
    event = found.event
    assert (event.messages_before, event.messages_after) == (10, 5)
    assert event.tokens_before == len(encode_chat(messages, tokenizer()))
    assert event.tokens_after == len(found.ids) == len(encode_chat(found.messages, tokenizer())) < event.tokens_before
    assert (event.summary, event.summary_tokens, event.reused, event.failed) == ("short", 5, False, None)


def test_a_strict_template_gets_the_summary_in_the_next_message():
    compactor, messages = Compactor(AT, tokenizer(STRICT), CONTEXT), turns(5)
    assert compactor.joined and not Compactor(AT, tokenizer(), CONTEXT).joined
    found, asked = made(compactor, messages, "short")
    first = {"role": "user", "content": f"{HEADING}short\n\n{messages[-3]['content']}"}
    assert found.messages == [SYSTEM, first, *messages[-2:]]
    assert "u2 " in asked[0] and "u3 " not in asked[0]


def test_an_older_summary_is_used_again_and_goes_into_the_next_one():
    compactor = Compactor(Compaction(at=170), tokenizer(), CONTEXT)
    made(compactor, turns(5), "short")
    again, _ = made(compactor, turns(5))
    assert again.messages[1]["content"] == HEADING + "short" and again.event.reused and again.event.summary_tokens == 0
    grown = turns(5) + [{"role": "assistant", "content": "a4"}, {"role": "user", "content": "hm"}]
    later, _ = made(compactor, grown)
    assert later.messages == [SYSTEM, {"role": "user", "content": HEADING + "short"}, *grown[-5:]], (
        "below the threshold still"
    )
    long = [*grown, {"role": "assistant", "content": "fox " * 20}, {"role": "user", "content": "then? " * 5}]
    last, asked = made(compactor, long, "shorter")
    assert asked[0].startswith(f"<|system|>Be brief.<|user|>{HEADING}short<|user|>u3 ") and "u2 " not in asked[0]
    assert last.messages == [SYSTEM, {"role": "user", "content": HEADING + "shorter"}, *long[-3:]]
    other = [{"role": "system", "content": "Be long."}, *turns(5)[1:]]
    assert made(compactor, other, "else")[0].event.summary == "else", "another conversation has no part in it"
    assert made(compactor, turns(5), "thought", template_knows=True)[0].event.summary == "thought"


def test_a_history_beyond_the_context_is_summarised_in_parts():
    compactor, messages = Compactor(AT, tokenizer(), CONTEXT), turns(30)
    assert len(encode_chat(messages, tokenizer())) > 1.9 * CONTEXT
    found, asked = talk(compactor, messages), []
    prompt = found.next()
    while prompt is not None:
        asked.append(tokenizer().decode(prompt))
        assert len(prompt) + AT.most <= CONTEXT
        prompt = found.next(f"part {len(asked)}", 5)
    assert len(asked) > 2 and all(f"part {i}" in text for i, text in enumerate(asked[1:], 1))
    assert sum(text.count("u7 ") for text in asked) == 1, "no turn twice"
    assert found.messages[1]["content"] == f"{HEADING}part {len(asked)}" and found.messages[2:] == messages[-3:]
    with pytest.raises(RequestError, match="a turn of the conversation takes more than the 603 tokens"):
        talk(compactor, turns(3, size=1600)).next()


@pytest.mark.parametrize(("summary", "why"), [(" \n", "came back empty"), ("long " * 200, "is no shorter")])
def test_a_summary_of_no_use_leaves_the_conversation_and_says_so(summary, why):
    compactor, messages = Compactor(AT, tokenizer(), CONTEXT), turns(5)
    found, _ = made(compactor, messages, summary)
    assert found.messages == messages and found.ids == encode_chat(messages, tokenizer())
    event = found.event
    assert why in event.failed and event.summary == "" and event.tokens_after == event.tokens_before
    assert made(compactor, messages, "short")[0].event.failed is None, "it was not remembered"


# What is refused at the start


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"template": None}, "has no chat template, so it has no conversations and cannot be asked for a summary"),
        ({"template": HALF}, "does not take a conversation of several turns .the template leaves messages out"),
        ({"template": "{{ raise_exception('no') }}"}, "does not take a conversation of several turns .*: no"),
        ({"at": CONTEXT}, f"compaction.at: got {CONTEXT}; allowed: {LEAST} to {CONTEXT - 1}, below the context"),
        ({"at": LEAST - 1}, f"compaction.at: got {LEAST - 1}; allowed: at least {LEAST}"),
        ({"keep_turns": 0}, "compaction.keep_turns: got 0; allowed: at least 1"),
        ({"summary_tokens": 200}, "compaction.summary_tokens: got 200; allowed: 1 to 149, below `at`"),
    ],
)
def test_without_a_summariser_it_is_refused(changes, told):
    template = changes.pop("template", tiny.TEMPLATE)
    with pytest.raises(RequestError, match=told):
        Compactor(dataclasses.replace(AT, **changes), tokenizer(template), CONTEXT)
    with pytest.raises(RequestError, match="has no tokenizer"):
        Compactor(AT, None, CONTEXT)


# Pages


def test_a_forgotten_prompt_gives_its_pages_back_but_for_those_in_use_or_kept():
    table = PageTable(SPEC, PagePool(32), rows=2, width=8, page_size=4)
    cache = PrefixCache([table])

    def keep(row, tokens):
        table.append(row, len(tokens))
        cache.insert(row, cache.keys(tokens))

    keep(0, range(24))
    table.free(0)
    assert table.pool.cached == 6
    assert cache.forget([7] * 8) == 0
    assert cache.forget(range(8), range(24)) == 0, "all of it is kept"
    keep(1, [*range(12), *[50] * 8])  # shares nothing in use: its own pages, those of the tree stay the older ones
    assert cache.forget(range(24), [*range(8), 1, 2, 3, 4]) == 3, "what the branch hangs on stays"
    assert table.pool.used + table.pool.cached + table.pool.available == 32
    table.free(1)
    assert cache.forget([*range(12), *[50] * 8]) == 5
    assert table.pool.available == 32


# A conversation over an engine


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compaction") / "tiny-llama"
    return optx.compile(optx.load(tiny.checkpoint(folder, max_position_embeddings=CONTEXT, num_hidden_layers=1)))


@pytest.fixture(scope="module")
def engine(compiled):
    return compiled.engine(rows=2, page_size=16, chunks=(64,))


SAY = optx.Sampling(max_tokens=4, ignore_eos=True)


def conversation(engine, compiled, **compaction):
    engine.prefix.clear()
    how = Compaction(**{"at": 150, "keep_turns": 2, "summary_tokens": 6} | compaction) if compaction else None
    return optx.Conversation(engine, compiled.tokenizer, messages=[SYSTEM], compaction=how)


def test_a_conversation_is_compacted_once_it_is_too_long(engine, compiled):
    plain, compact = conversation(engine, compiled), conversation(engine, compiled, at=150)
    events = []
    for i in range(6):
        events.append(compact.say(f"u{i} " + "jugs " * 6, SAY))
        if not any(turn.compaction for turn in events):
            assert events[-1] == plain.say(f"u{i} " + "jugs " * 6, SAY), "below the threshold it is the plain one"
    happened = [turn for turn in events if turn.compaction]
    assert happened and events.index(happened[0]) >= 2
    event = happened[0].compaction
    assert event.tokens_before > 150 > event.tokens_after == happened[0].prompt_tokens and event.summary_tokens <= 6
    assert compact.messages[0] == SYSTEM and compact.messages[1]["content"] == HEADING + happened[-1].compaction.summary
    assert compact.messages[-2]["content"].startswith("u5 ")
    assert len(encode_chat(compact.messages, compiled.tokenizer)) < 200
    engine.check()


def test_the_answer_is_that_of_the_new_shorter_prompt_from_position_0(engine, compiled):
    compact = conversation(engine, compiled, at=150)
    turn = None
    while turn is None or turn.compaction is None:
        turn = compact.say("jugs " * 6, SAY)
    ids = encode_chat(compact.messages[:-1], compiled.tokenizer)
    logits = np.asarray(compiled.logits([ids]))[0, -1]
    answer = compact.messages[-1]["content"]
    assert compiled.tokenizer.decode([int(logits.argmax())]) == answer[:1] or answer.startswith(
        compiled.tokenizer.decode([int(logits.argmax())])
    )
    assert turn.text == compiled.generate([ids], SAY)[0] or turn.text == compiled.tokenizer.decode(
        compiled.generate([ids], SAY)[0]
    )


def test_pages_fall_when_old_turns_go(engine, compiled):
    compact = conversation(engine, compiled, at=300)
    turn, pages = None, []
    while turn is None or turn.compaction is None:
        turn = compact.say("jugs " * 6, SAY)
        stats = engine.stats()
        pages.append(stats.pages_cached)
        assert stats.pages_used == 0
    assert pages[:-1] == sorted(pages[:-1]) and pages[-2] >= 300 // 16 - 4
    room = -(-(turn.prompt_tokens + 4) // 16)
    assert pages[-1] <= room < pages[-2], "nothing is cached but the new prompt"
    left = conversation(engine, compiled)
    assert left.say("hm", SAY).compaction is None
    engine.check()


def test_a_callback_may_summarise(engine, compiled):
    seen = []

    def summarize(messages):
        seen.append(list(messages))
        return f"{len(messages)} messages"

    compact = conversation(engine, compiled, at=150, summarize=summarize)
    said = [compact.say("jugs " * 6, SAY) for _ in range(6)]
    (event, *_) = [turn.compaction for turn in said if turn.compaction]
    assert event.summary == f"{len(seen[0])} messages" and event.summary_tokens == 0
    assert (
        seen[0][0] == SYSTEM
        and seen[0][-1]["role"] == "assistant"
        and compact.messages[1]["content"].startswith(HEADING)
    )
    wrong = conversation(engine, compiled, at=150, summarize=lambda messages: None)
    wrong.messages += turns(5, lead=())[:-1]
    before = list(wrong.messages)
    with pytest.raises(RequestError, match="compaction.summarize: got NoneType; allowed: text"):
        wrong.say("hm", SAY)
    assert wrong.messages == before, "as they were"


def test_a_conversation_says_why_it_cannot_be_compacted(engine, compiled):
    with pytest.raises(RequestError, match="no tokenizer"):
        optx.Conversation(engine, None, compaction=AT)
    with pytest.raises(RequestError, match="below the context"):
        optx.Conversation(engine, compiled.tokenizer, compaction=Compaction(at=CONTEXT))
