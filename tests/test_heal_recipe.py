"""Healing as a step of a recipe: plan, compile, export, ablation; its text; what is refused before a weight is read."""

import dataclasses

import families
import healing
import numpy as np
import pytest
import tiny

import optx
from optx import ablate, heal_data, heal_memory, heal_sample, ir
from optx.ablate_config import ModelRow, Study
from optx.checkpoint.source import from_module
from optx.errors import HealError, LegalityError, PassError, RecipeError
from optx.heal_memory import needed
from optx.passes.distill import Distill
from optx.passes.quantize_weights import QuantizeWeights
from optx.passes.sliding_window import SlidingWindow
from optx.recipe import Recipe

INT8 = QuantizeWeights(format="int8", match="layers/.*")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of each test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "optx" / "heal"


@pytest.fixture(scope="module")
def source():
    return healing.source()


def recipe(folder, *, weights=(), **changes):
    return Recipe(attention=(healing.WINDOW,), heal=(healing.options(folder, **changes),), weights=weights)


def unread(source):
    """The source, which fails where a weight is read."""

    def read(path):
        raise AssertionError(f"{path} was read")

    return dataclasses.replace(source, read=read)


# Plan and compile


def test_a_recipe_says_it_in_yaml(tmp_path):
    text = "heal:\n- {pass: distill, text: [a.txt, b.npy], steps: 10, lr: 1.0e-4, train: lora, rank: 4}\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    found = Recipe.from_yaml(tmp_path / "r.yaml")
    assert found.heal == (Distill(text=("a.txt", "b.npy"), steps=10, lr=1e-4, train="lora", rank=4),)
    assert Recipe.from_dict(found.to_dict()) == found
    with pytest.raises(RecipeError, match=r"recipe.heal\[0\].step: unknown field of Distill; did you mean 'steps'"):
        Recipe.from_dict({"heal": [{"pass": "distill", "text": ["a"], "step": 3}]})


def test_a_plan_shows_it_and_runs_nothing(source, tmp_path, cache):
    planned = optx.plan(unread(source), recipe(tmp_path, minutes=2.0), target="h100")
    assert [record.name for record in planned.records] == ["sliding_window", "distill"]
    assert "6 steps of 4 sequences of 24 tokens, 576 tokens in all or 2 minutes of training" in str(planned)
    assert "h100 has 80.0 GB" in str(planned) and "not healed" not in str(planned)
    (told,) = planned.to_dict()["healing"]
    assert told["options"]["steps"] == 6 and sum(told["bytes"].values()) > 10 * ir.weight_bytes(planned.trees[0]) / 4
    assert not cache.exists()


def test_passes_that_need_healing_say_so(source):
    assert "not healed: sliding_window start training-free" in str(
        optx.plan(source, Recipe(attention=(healing.WINDOW,)))
    )
    assert "not healed" not in str(optx.plan(source, Recipe(weights=(INT8,))))


def test_compile_heals_then_goes_on(source, tmp_path, cache, monkeypatch):
    """Passes of later stages run on what was healed; a second compile reads it; quality is against the uncompiled model."""
    steps = {"steps": 30, "lr": 1e-2, "converted": 0.3}
    first = optx.compile(source, recipe(tmp_path, weights=(INT8,), **steps), calibration=healing.TEXT[:400])
    slide, heal, round_ = (record.quality.kl for record in first.plan.records)
    assert heal < 0.9 * slide and round_ < 1.1 * heal
    won = first.plan.records[1].healing
    assert "held-out KL" in str(first.report) and f"{won.steps} steps" in str(first.report)
    assert first.report.to_dict()["records"][1]["healing"]["kl"] == won.kl
    monkeypatch.setattr("optx.heal_run.Run.train", None)
    second = optx.compile(source, recipe(tmp_path, weights=(INT8,), **steps), measured=False)
    assert np.array_equal(second.logits([[1, 2, 3]]), first.logits([[1, 2, 3]]))
    assert second.plan.records[1].healing == won and len(list(cache.iterdir())) == 1
    plain = optx.compile(source, Recipe(attention=(healing.WINDOW,), weights=(INT8,)))
    assert not np.allclose(plain.logits([[1, 2, 3]]), first.logits([[1, 2, 3]]), atol=1e-3)


def test_a_budget_counts_from_healing_on(source, tmp_path):
    steps = {"steps": 30, "lr": 1e-2, "converted": 0.3}
    healed = recipe(tmp_path, **steps)
    records = optx.compile(source, healed, calibration=healing.TEXT[:400]).plan.records
    before, after = (record.quality.kl for record in records)
    budget = (before + after) / 2
    optx.compile(source, dataclasses.replace(healed, max_kl=budget), calibration=healing.TEXT[:400])
    with pytest.raises(optx.errors.QualityError, match="sliding_window brings the KL"):
        unhealed = Recipe(attention=(healing.WINDOW,), max_kl=budget)
        optx.compile(source, unhealed, calibration=healing.TEXT[:400])


def test_other_weights_are_another_run(source, tmp_path, cache):
    optx.compile(source, recipe(tmp_path, converted=0.0, steps=1))
    other = from_module(families.concrete("llama", 1), "tiny", families.tokenizer())
    optx.compile(other, recipe(tmp_path, converted=0.0, steps=1))
    assert len(list(cache.iterdir())) == 2


def test_rows_of_an_ablation_are_healed(source, tmp_path):
    """Two variants that share conversion and healing train once; one that cannot be healed is a row with its reason."""
    model = tiny.checkpoint(tmp_path / "tiny")
    healed = recipe(tmp_path, steps=30, lr=1e-2, converted=0.0)
    variants = (
        Recipe(name="slide", attention=healed.attention),
        dataclasses.replace(healed, name="healed"),
        dataclasses.replace(healed, name="healed int8", weights=(INT8,)),
        Recipe(name="nothing converted", heal=healed.heal),
    )
    study = Study(
        name="s", description="", models=(ModelRow(model=str(model)),), variants=variants, text=healing.TEXT[:1000],
        calibration=None, measured=False, context=64, stride=None, max_windows=3, target=optx.target.get("h100"),
        decode_context=128, x="bits",
    )  # fmt: skip
    found = {result.variant: result for result in ablate.run(study, tmp_path / "out", say=lambda text: None)}
    assert found["healed"].kl < 0.9 * found["slide"].kl and found["healed int8"].kl < 1.2 * found["healed"].kl
    assert "HealError: distill: nothing was converted" in found["nothing converted"].refused
    one, two = (found[name].passes[1]["healing"] for name in ("healed", "healed int8"))
    assert one == two and one["steps"] == 30


# Text


def test_sequences_are_cut_as_evaluation_cuts_windows(tmp_path):
    source = from_module(families.abstract("llama"), "tiny", families.tokenizer(add_bos=True))
    rows, held = heal_data.sequences(source, healing.options(tmp_path, context=25))
    ids = source.tokenizer.encode(healing.TEXT, add_special=False)
    every = [[families.BOS, *ids[i : i + 24]] for i in range(0, len(ids) - 23, 24)]
    assert sorted(np.concatenate([rows, held]).tolist()) == sorted(every) and len(held) == 4
    places = [every.index(row) for row in held.tolist()]
    assert places[0] == 0 and places[-1] == len(every) - 1, "spread evenly"


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_token_shards(dtype, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(600, dtype=dtype) % 250)
    source = dataclasses.replace(from_module(families.abstract("llama")), tokenizer=None)
    options = Distill(**(healing.QUICK | {"text": (str(tmp_path / "a.npy"),)}))
    rows, held = heal_data.sequences(source, options)
    assert rows.dtype == np.int32 and len(rows) + len(held) == 25 and rows[0].tolist() == list(range(24, 48))


def test_batches_are_shuffled_and_go_on_from_a_state(tmp_path):
    rows = np.arange(40, dtype=np.int32).reshape(10, 4)
    options = healing.options(tmp_path, batch=4, context=4)
    one, two = (heal_data.batches(rows, options) for _ in range(2))
    seen = [next(one).tolist() for _ in range(3)]
    two.set_state(one.get_state())
    assert [next(one).tolist() for _ in range(5)] == [next(two).tolist() for _ in range(5)]
    firsts = [row[0] for batch in seen for row in batch]
    assert sorted(firsts[:10]) == sorted(rows[:, 0].tolist()) != firsts[:10], (
        "an epoch holds every row once, in another order"
    )


def test_what_the_model_writes_is_kept(source, tmp_path, monkeypatch):
    options, model = healing.options(tmp_path, sample=6, context=12, seed=3), source.load()
    starts = [[families.BOS]] * 6
    rows = heal_sample.sampled(model, starts, options, tmp_path / "shard.npy")
    assert rows.shape == (6, 12) and (rows[:, 0] == families.BOS).all() and len(np.unique(rows[:, 1:], axis=0)) == 6
    assert np.array_equal(rows, heal_sample.sampled(model, starts, options, tmp_path / "again.npy"))
    monkeypatch.setattr(heal_sample, "Engine", None)
    assert np.array_equal(rows, heal_sample.sampled(model, starts, options, tmp_path / "shard.npy"))
    train, held = heal_data.sequences(source, dataclasses.replace(options, text=(), batch=2), rows)
    assert sorted(np.concatenate([train, held]).tolist()) == sorted(rows.tolist())


@pytest.mark.parametrize("first", [None, families.BOS])
def test_samples_go_on_from_the_text(source, tmp_path, monkeypatch, first):
    monkeypatch.setattr(heal_data, "first_token", lambda source: first)
    before = [] if first is None else [first]
    plain = heal_sample.starts(source, healing.options(tmp_path, sample=8))
    assert {len(start) for start in plain} == {1} and (first is None) == (len({start[0] for start in plain}) > 1)
    options = healing.options(tmp_path, sample=8, context=12, seed=3, prime=5)
    (stream,) = heal_data.texts(source, options)
    starts = heal_sample.starts(source, options)
    places = {tuple(stream[i : i + 5].tolist()) for i in range(len(stream) - 4)}
    assert all(start[:-5] == before and tuple(start[-5:]) in places for start in starts)
    assert len({tuple(start) for start in starts}) > 4
    rows = heal_sample.sampled(source.load(), starts, options, tmp_path / "shard.npy")
    assert rows.shape == (8, 12) and [row[: len(starts[0])] for row in rows.tolist()] == starts


def test_text_that_is_shorter_than_what_samples_begin_with(source, tmp_path):
    (tmp_path / "short.txt").write_text("the quick brown fox", encoding="utf-8")
    options = healing.options(tmp_path, text=(str(tmp_path / "short.txt"),), sample=4, prime=21)
    with pytest.raises(HealError, match=r"distill.prime: got 21 tokens; the longest text has \d+: give longer text"):
        optx.compile(unread(source), Recipe(attention=(healing.WINDOW,), heal=(options,)))


def test_samples_of_another_dtype(source):
    model = source.load()
    narrow = heal_sample.in_dtype(model, "bfloat16")
    assert {str(x.get_value().dtype) for x in ir.params(narrow).values()} == {"bfloat16"}
    assert {spec.dtype for spec in narrow.cache_plan().specs} == {"bfloat16"}
    tokens = np.arange(2, 14)[None]
    found, wanted = (np.asarray(tree(tokens), np.float32) for tree in (narrow, model))
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_model_is_healed_on_what_it_writes(source, tmp_path, cache):
    step = Distill(**(healing.QUICK | {"sample": 10, "steps": 2, "converted": 0.0}))
    compiled = optx.compile(source, Recipe(attention=(healing.WINDOW,), heal=(step,)))
    assert compiled.plan.records[1].healing.tokens == 2 * 4 * 24
    (shard,) = cache.glob("sample-*.npy")
    assert np.load(shard).shape == (10, 24)


# Refusals


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"context": 120, "batch": 200},
            "make 6. sequences of 120; a batch of 200 and 4 held-out ones need 204: give more",
        ),
        ({"context": 200}, "distill.context: got 200; allowed: up to the model's 128"),
        ({"devices": 4}, "distill.devices: got 4; this machine has 1"),
        ({"text": ("nowhere.txt",)}, "distill.text: nowhere.txt: no such file"),
    ],
    ids=str,
)
def test_refused_before_a_weight_is_read(source, tmp_path, changes, told):
    with pytest.raises(HealError, match=told):
        optx.compile(unread(source), recipe(tmp_path, **changes))


def test_too_little_memory_is_told_in_numbers(source, tmp_path, monkeypatch):
    monkeypatch.setattr(heal_memory, "available", lambda target=None: 10**6)
    with pytest.raises(
        HealError, match=r"needs at least \d.* MB \(teacher .*, student .*optimizer.*has 1.0 MB; raise acc"
    ):
        optx.compile(unread(source), recipe(tmp_path))


def test_memory_is_counted_from_what_moves(tmp_path):
    teacher = families.abstract("llama")
    student = optx.plan(teacher, Recipe(attention=(healing.WINDOW,))).tree
    count, changed = ir.weight_count(teacher), 32 * 32 * 2 + 32 * 16 * 2
    parts = needed(teacher, student, healing.options(tmp_path))
    assert (parts["teacher"], parts["student"], parts["optimizer"]) == (4 * count, 8 * count, 12 * count)
    parts = needed(teacher, student, healing.options(tmp_path, dtype="bfloat16", train="converted", accumulate=2))
    assert (parts["teacher"], parts["student"], parts["optimizer"]) == (2 * count, 6 * count, 16 * changed)
    assert needed(teacher, student, healing.options(tmp_path, train="lora"))["optimizer"] > 12 * changed


def test_nothing_to_heal(source, tmp_path):
    with pytest.raises(HealError, match="nothing was converted, so there is nothing to heal"):
        optx.compile(unread(source), Recipe(heal=(healing.options(tmp_path),)))


def test_packed_weights(tmp_path):
    model = families.concrete("llama")
    path = families.write_llama_gguf(tmp_path / "m.gguf", model, lambda rows: ("Q8_0", families.q8_0(rows)))
    packed = optx.load(str(path), weights="packed")
    with pytest.raises(LegalityError, match="distill at /embed/table and 15 more.*load with weights='dense'"):
        optx.compile(unread(packed), recipe(tmp_path))
    allowed = dataclasses.replace(recipe(tmp_path), allow=("packed_before_fold",))
    with pytest.raises(
        HealError, match="embed/table is packed .*healing needs dense weights: load with weights='dense'"
    ):
        optx.compile(unread(packed), allowed)


def test_shards_of_another_tokenizer(source, tmp_path):
    np.save(tmp_path / "a.npy", np.full(900, 999))
    np.save(tmp_path / "b.npy", np.full(900, 0.5))
    for name, told in (
        ("a.npy", "token ids 999 to 999; the model's are 0 to 263"),
        ("b.npy", "float64; allowed: token ids"),
    ):
        with pytest.raises(HealError, match=told):
            optx.compile(unread(source), recipe(tmp_path, text=(str(tmp_path / name),)))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"steps": 0}, "distill.steps: got 0; allowed: 1 to"),
        ({"batch": 6, "accumulate": 4}, "distill.batch: got 6; allowed: multiples of accumulate x devices = 4 x 1"),
        ({"converted": 1.5}, "distill.converted: got 1.5; allowed: 0 to 1"),
        ({"minutes": 0.0}, "distill.minutes: got 0.0; allowed: above 0"),
        (
            {"prime": 511, "sample": 4},
            "distill.prime: got 511 with 1 texts, sample: 4, context: 512; it wants text, samples, and",
        ),
        ({"prime": 5}, "distill.prime: got 5 with 1 texts, sample: 0, context: 512; it wants text, samples, and"),
        ({"text": ()}, "distill.text: got none; list files"),
        ({"lr": float("nan")}, "distill.lr: got nan"),
    ],
    ids=str,
)
def test_wrong_options(changes, told):
    with pytest.raises(PassError, match=told):
        Distill(**({"text": ("a.txt",)} | changes))


def test_a_loss_that_is_no_number_ends_the_run(source, tmp_path):
    with pytest.raises(HealError, match=r"the loss is nan at step \d+, .*; lower lr \(now 1e\+09\)"):
        optx.compile(source, recipe(tmp_path, lr=1e9, clip=1e9, warmup=0.0, steps=20, converted=0.0))


def test_windows_of_every_layer_are_healed_too(source, tmp_path):
    """Every mixer is converted: nothing is left to stay behind in the first phase but norms, MLPs and the embedding."""
    every = Recipe(attention=(SlidingWindow(window=4, sinks=1),), heal=(healing.options(tmp_path, train="converted"),))
    won = optx.compile(source, every).plan.records[1].healing
    assert won.moved == 2 * (2 * 32 * 32 + 2 * 32 * 16)
