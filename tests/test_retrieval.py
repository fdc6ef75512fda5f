"""Retrieval over generated prompts: exact lengths, the same prompts for all recipes, scores, what is kept, what is written."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

import optx
from optx import cli, kept
from optx.bench import retrieval, retrieval_plot
from optx.bench.retrieval import Grid
from optx.bench.retrieval_table import Cell, Outcome, Row, retained
from optx.bench.retrieval_tasks import WORDS, Forced, Maker, Setting, right
from optx.errors import RecipeError, RequestError
from optx.recipe import Recipe

CONTEXT = 640
TEXT = "A cat sat. It slept all day! Did it dream? Nobody knows what cats dream of. " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval") / "tiny-llama"
    return tiny.checkpoint(folder, max_position_embeddings=CONTEXT, num_hidden_layers=1)


@pytest.fixture(scope="module")
def tokenizer(model):
    return optx.load(model).tokenizer


def grid(**changes) -> Grid:
    settings = {"task": "needle", "keys": 3}
    settings |= {name: changes.pop(name) for name in ("task", "keys", "seed", "text") if name in changes}
    return Grid(
        **{"setting": Setting(**settings), "lengths": (300,), "depths": (0.0, 1.0), "samples": 2, "rows": 4} | changes
    )


# Prompts


@pytest.mark.parametrize("task", ["needle", "multikey"])
@pytest.mark.parametrize("text", [None, TEXT])
def test_prompts_are_as_long_as_asked_and_hold_the_answer_once(tokenizer, task, text):
    maker = Maker(Setting(task=task, keys=3, text=text), tokenizer)
    for length in (333, 512, 600):
        for sample in range(4):
            prompt = maker.prompt(length, 0.5, sample)
            said = tokenizer.decode(list(prompt.ids), skip_special=False)
            assert len(prompt.ids) == length and prompt.ids[0] == tokenizer.bos_id
            assert said.count(prompt.number) == 1 and len(prompt.number) == 7
            assert said.count("The special magic number") == (1 if task == "needle" else 3) + 1, "and the question"
            word = said.rsplit("number for ", 1)[1].split()[0]
            assert f"The special magic number for {word} is {prompt.number}." in said
            assert tokenizer.decode(list(prompt.answer)) == f" {prompt.number}"


def test_the_needle_lies_where_it_was_put(tokenizer):
    maker = Maker(Setting(), tokenizer)
    said = [tokenizer.decode(list(maker.prompt(600, depth, 0).ids)) for depth in (0, 0.25, 0.5, 0.75, 1)]
    places = [text.index("The special magic") / text.rindex(" The special magic") for text in said]
    assert places[0] < 0.02 and places == sorted(places)
    assert np.allclose(places[1:4], [0.25, 0.5, 0.75], atol=0.1)
    before = said[4][: said[4].rindex(" The special magic")]
    assert before.endswith(".") and before.rstrip(".").split()[-1].isdigit(), "whole sentences, the needle's the last"


def test_a_prompt_depends_on_nothing_but_its_place_and_the_setting(tokenizer):
    one, two = (Maker(Setting(task="multikey", keys=3), tokenizer) for _ in range(2))
    two.prompt(512, 0.0, 3)
    assert one.prompt(512, 0.5, 1) == two.prompt(512, 0.5, 1)
    others = [one.prompt(512, 0.5, 2), one.prompt(513, 0.5, 1), one.prompt(512, 0.25, 1)]
    others += [Maker(Setting(task="multikey", keys=3, seed=1), tokenizer).prompt(512, 0.5, 1)]
    assert len({prompt.number for prompt in (one.prompt(512, 0.5, 1), *others)}) == 5


def test_what_does_not_fit_is_refused_with_the_length_that_does(tokenizer):
    maker = Maker(Setting(task="multikey", keys=20), tokenizer)
    with pytest.raises(RequestError, match=r"got 100; .* 'multikey' holds besides filler took \d+ tokens") as found:
        maker.prompt(100, 0.5, 0)
    least = int(str(found.value).split(" took ")[1].split()[0]) + 60  # words and numbers of another length take others
    assert len(maker.prompt(least, 0.5, 0).ids) == least
    with pytest.raises(RequestError, match="no tokenizer"):
        Maker(Setting(), None)
    with pytest.raises(RequestError, match="holds no sentence"):
        Maker(Setting(text=" \n"), tokenizer)
    with pytest.raises(RequestError, match=f"retrieval.keys: got 1; allowed: 2 to {len(WORDS)}"):
        Setting(keys=1)


# Scores


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 1234567.", True),
        ("1234567", True),
        (" the number 1234567, or 7654321", True),
        (" 7654321, no: 1234567", False),
        (" 12345678", False),
        (" 123456", False),
        (" 123 4567", False),
        (" 01234567", False),
        ("", False),
        (" none", False),
    ],
)
def test_an_answer_is_right_digit_for_digit_or_wrong(answer, found):
    assert right(answer, "1234567") is found


def row(name, scores, **changes) -> Row:
    cells = [
        Cell(length=1024 * (1 + i // 2), depth=i % 2, numbers=("1",), answers=("1",), score=score, logprob=-score, pages=4.0,
             bytes=4096.0, tokens=100, seconds=2.0)
        for i, score in enumerate(scores)
    ]  # fmt: skip
    return Row(**{"recipe": name, "steps": {}, "cells": tuple(cells)} | changes)


def outcome(*rows) -> Outcome:
    protocol = {"task": "multikey", "keys": 4, "seed": 0, "text": "x.txt", "samples": 2, "depths": (0.0, 1.0)}
    return Outcome(model="m", protocol=protocol, rows=rows)


def test_retained_counts_the_cells_that_the_uncompiled_model_finds():
    base = row("(uncompiled)", [1.0, 0.8, 0.75, 0.0])
    assert retained(base, base) == 1.0
    assert retained(row("a", [0.5, 0.4, 1.0, 1.0]), base) == pytest.approx(0.9 / 1.8)
    assert retained(row("a", [0.5]), row("(uncompiled)", [0.7])) is None


def test_tables_hold_every_recipe_and_why_one_was_refused():
    found = outcome(
        row("(uncompiled)", [1.0, 0.8, 0.5, 0.0]), row("kv", [0.5, 0.4, 0.5, 0.5]), row("no", [], refused="E: why")
    )
    text = found.markdown()
    assert "| (uncompiled) | 57.5 % | 100.0 % | -0.575 | 90.0 % | 25.0 % |" in text
    assert "| kv | 47.5 % | 50.0 % | -0.475 | 45.0 % | 50.0 % |" in text
    assert "| no | refused | - | - | - | - |" in text and "refused: no: E: why" in text
    assert "| kv | 1,024 | 4 | 4.1 kB | 4 | 50 |" in text and "over the 2 of 4 cells" in text
    assert "kv" in found.text() and "among 3 others" in found.text()
    assert [r["retained"] for r in found.to_dict()["rows"]] == [1.0, 0.5, None]


def test_the_heat_map_is_drawn_and_tells_scores_apart(tmp_path):
    from matplotlib import image

    def drawn(scores):
        retrieval_plot.draw(
            outcome(row("(uncompiled)", [1.0] * 4), row("kv", scores), row("no", [], refused="why")), path
        )
        return image.imread(path)

    path = tmp_path / "a.png"
    full, empty = drawn([1.0] * 4), drawn([0.0] * 4)
    assert full.shape == empty.shape and min(full.shape[:2]) > 300
    assert full[..., :3].mean() < empty[..., :3].mean() - 0.005, "a higher score is darker"
    assert not retrieval_plot.draw(outcome(row("no", [], refused="why")), path)


def test_forced_tokens_come_in_their_order_alone():
    matcher = Forced((70, 3)).matcher()
    for token in (70, 3):
        assert np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist() == [token]
        assert not matcher.done
        matcher.accept(token)
    assert matcher.done


# End to end


INT8 = {"cache": [{"pass": "quantize_kv", "format": "int8"}]}
NOWHERE = {"cache": [{"pass": "quantize_kv", "format": "int8", "match": "nowhere"}]}


def recipe(name, steps) -> Recipe:
    return Recipe.from_dict({"name": name, **steps})


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    """One run, and the prompts that each recipe's engine was given."""
    out, asked = tmp_path_factory.mktemp("run"), []
    real = retrieval.measure

    def spy(engine, maker, prompts, *rest):
        asked.append(prompts)
        return real(engine, maker, prompts, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "measure", spy)
        rows = retrieval.run(str(model), [recipe("kv8", INT8), recipe("bad", NOWHERE)], grid(), out)
    return out, rows, asked


def test_every_recipe_is_asked_the_same(first):
    _, rows, asked = first
    assert [r.recipe for r in rows] == ["(uncompiled)", "kv8", "bad"]
    assert len(asked) == 4 and asked[:2] == asked[2:] and asked[0] != asked[1]
    assert rows[2].refused.startswith("PassError: ") or rows[2].refused.startswith("RecipeError: ")


def test_figures_are_those_of_the_model(first, model):
    """The forced number's log-probability is what the logits give; pages hold the whole prompt."""
    _, (base, kv8, _), asked = first
    compiled = optx.compile(optx.load(model))
    for cell, prompts in zip(base.cells, asked):
        found = []
        for prompt in prompts:
            logits = np.asarray(compiled.logits([[*prompt.ids, *prompt.answer]]))[0, len(prompt.ids) - 1 : -1].astype(
                np.float64
            )
            likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            found.append(sum(likely[i, token] for i, token in enumerate(prompt.answer)) / 7)
        assert cell.logprob == pytest.approx(np.mean(found), abs=1e-4)
        assert cell.score == np.mean([right(a, n) for a, n in zip(cell.answers, cell.numbers)])
        pages, token = -(-cell.length // 64), compiled.program.plan.bytes(1, 1)
        assert (cell.pages, cell.bytes) == (pages, pages * 64 * (token + 4))
        assert cell.tokens >= 2 * (cell.length + len(prompts[0].answer))
    assert all(0 < its.bytes < mine.bytes and its.pages == mine.pages for mine, its in zip(base.cells, kv8.cells))
    assert base.cells[0].logprob != kv8.cells[0].logprob, "int8 keys change a little"


def test_pages_of_a_prompt_that_is_cut_are_those_after_the_cut(model, tmp_path):
    """300 tokens are 5 pages, a quarter of them and the answer 2."""
    cut = {"cache": [{"pass": "evict_kv", "policy": "snapkv", "ratio": 0.25, "recent": 8}]}
    base, snap = retrieval.run(str(model), [recipe("snap", cut)], grid(depths=(0.5,)), tmp_path)
    assert (base.cells[0].pages, snap.cells[0].pages) == (5, 2)
    assert snap.cells[0].bytes < base.cells[0].bytes / 2


def test_a_second_run_takes_what_is_kept_and_computes_what_is_not(first, model, monkeypatch):
    out, rows, _ = first
    measured = []
    real = retrieval.measure
    monkeypatch.setattr(retrieval, "measure", lambda *args: measured.append(args[-2:]) or real(*args))
    recipes = [recipe("another_name", INT8)]
    again = retrieval.run(str(model), recipes, grid(), out)
    assert [r.cells for r in again] == [r.cells for r in rows[:2]] and not measured
    gone = min((out / "results").glob("*.json"))
    gone.write_text("{")
    again = retrieval.run(str(model), recipes, grid(), out)
    assert len(measured) == 1
    strip = [[dataclasses.replace(cell, seconds=0) for cell in r.cells] for r in (*again, *rows[:2])]
    assert strip[:2] == strip[2:]
    retrieval.run(str(model), [], grid(lengths=(300, 301)), out)
    assert measured[1:] == [(301, 0.0), (301, 1.0)], "a larger grid computes its new cells alone"


def test_a_run_that_is_stopped_leaves_its_cells(model, tmp_path, monkeypatch):
    real, calls = retrieval.measure, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(retrieval, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        retrieval.run(str(model), [], grid(), tmp_path)
    retrieval.run(str(model), [], grid(), tmp_path)
    assert len(calls) == 3


def test_wrong_settings_are_refused_before_weights_are_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval.Workbench, "cells", None)
    with pytest.raises(RequestError, match=f"retrieval.length: got 700; the context is {CONTEXT} and an answer takes"):
        retrieval.run(str(model), [], grid(lengths=(700,)), tmp_path)
    with pytest.raises(RecipeError, match="two recipes are called 'kv8'"):
        retrieval.run(str(model), [recipe("kv8", INT8), recipe("kv8", NOWHERE)], grid(), tmp_path)
    with pytest.raises(RequestError, match="retrieval.rows: got 1; allowed: at least 2"):
        grid(rows=1)


def test_the_command_writes_tables_and_a_plot(first, model, tmp_path, capsys):
    out, rows, _ = first
    words = [
        "bench",
        "retrieval",
        str(model),
        "--length",
        "300",
        "--depths",
        "2",
        "--samples",
        "2",
        "--keys",
        "3",
        "--rows",
        "4",
    ]
    assert cli.run([*words, "--out", str(out), "--json"]) == 0
    printed, told = capsys.readouterr()
    assert "2 of 2 cells kept" in told and json.loads(printed) == json.loads((out / "results.json").read_text())
    assert json.loads(printed)["rows"][0]["score"] == rows[0].score()
    assert (out / "table.md").read_text().startswith("# retrieval, needle: tiny-llama")
    assert (out / "retrieval.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.run([*words[:-1], "1", "--out", str(tmp_path)]) == 2
    assert "rows" in capsys.readouterr().err


def test_kept_names_follow_their_inputs():
    assert kept.key({"a": 1, "b": [2]}) == kept.key({"b": [2], "a": 1}) != kept.key({"a": 1, "b": [3]})
