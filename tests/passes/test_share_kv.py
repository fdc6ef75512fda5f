"""share_kv: layers that hold the same in other coordinates share exactly, bytes fall as claimed, decoding reads the producer."""

import calibrated
import families
import jax.numpy as jnp
import numpy as np
import pytest
from test_gqa import heads_of, with_weight
from test_turboquant import NAMES, shapes

import optx
from optx import ir
from optx.errors import LegalityError, OptxError, PassError
from optx.passes.share_kv import ShareKV
from optx.recipe import Calibration, Recipe


def through(model, text=None, **options):
    return calibrated.through(model, Recipe(structure=[ShareKV(**options)]), text)[0]


def four(family="llama", **changes):
    return families.concrete(family, num_hidden_layers=4, **changes)


def twins(family: str):
    """Layer 1 sees what layer 0 sees (which adds nothing to the stream), through the same norm, and has its keys and values in
    other coordinates, heads swapped."""
    tree, rng = ir.shallow(families.concrete(family, head_dim=8)), np.random.default_rng(4)
    first, second = tree.layers
    silent = lambda linear: ir.replace(linear, weight=jnp.zeros_like(linear.weight.get_value()))  # noqa: E731
    second.norm = first.norm
    k, v = (heads_of(part, 2)[:, ::-1] for part in (first.mixer.k, first.mixer.v))
    plane = (k[..., :4] + 1j * k[..., 4:]) * (rng.normal(size=4) + 1j * rng.normal(size=4))
    k, v = np.concatenate([plane.real, plane.imag], axis=-1), v @ rng.normal(size=(8, 8))
    second.mixer = ir.replace(second.mixer, k=with_weight(second.mixer.k, k), v=with_weight(second.mixer.v, v))
    first.mixer = ir.replace(first.mixer, o=silent(first.mixer.o))
    first.mlp = ir.replace(first.mlp, down=silent(first.mlp.down))
    return tree


def test_the_same_in_other_coordinates_is_shared_exactly():
    model, tokens = twins("llama"), families.prompt(24)
    want = families.forward(model, tokens)
    assert families.relative(families.forward(through(model, factor=2), tokens), want) < 1e-3  # of the ridge
    assert families.relative(families.forward(through(model, factor=2, align=False), tokens), want) > 0.1


@pytest.mark.parametrize(
    ("options", "owners"),
    [({"factor": 2}, [0, 0, 2, 2]), ({"factor": 4}, [0] * 4), ({"producer": 1}, [0, 1, 1, 1]), ({"producer": -3}, [0, 1, 1, 1])],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bytes_fall_by_the_layers_that_share(family, options, owners):
    model, tokens = four(family), families.prompt(15)
    tree = through(model, **options)
    plan = tree.cache_plan()
    assert [plan.owner(i) for i in range(4)] == owners
    assert plan.unit_bytes == model.cache_plan().unit_bytes * len(set(owners)) / 4
    kept = [tree.layers[i].mixer.k is not None for i in range(4)]
    assert kept == [owner == i for i, owner in enumerate(owners)]
    whole = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, sizes=(6, 1)), whole) < 1e-4


def test_alignment_loses_less():
    model, tokens = four(), families.prompt(32, seed=5)
    want, text = families.forward(model, tokens), calibrated.windows(model, 16, 32)
    lost = [
        families.relative(families.forward(through(model, text, factor=2, align=a), tokens), want)
        for a in (True, False)
    ]
    assert lost[0] < lost[1], lost


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("options", [{"factor": 2}, {"producer": 0}], ids=str)
def test_every_family_runs_or_is_refused(family, options):
    """Refused on shapes where layers differ; where they are alike, weights take the form that was planned and run."""
    recipe = Recipe(structure=[ShareKV(**options)])
    try:
        planned = optx.plan(shapes(family), recipe)
    except LegalityError as error:
        assert "reads_other_heads" in str(error)
    except PassError as error:
        assert "changed nothing: keeps its cache" in str(error)
    else:
        tree = through(ir.init_weights(shapes(family), seed=1), **options)
        assert np.isfinite(families.forward(tree, families.prompt(9)[:9])).all()
        assert planned.records[0].cache_bytes[1] < planned.records[0].cache_bytes[0]


def test_a_compile_measures_what_it_costs(tmp_path):
    """Sites that begin to read another's cache have no output of their own to compare; the KL is measured all the same."""
    path, _ = families.hf_dir(tmp_path / "m", "llama", add_bos=True, num_hidden_layers=4)
    text = " ".join(f"{i * i % 97} seen" for i in range(80))
    recipe = Recipe(structure=[ShareKV(factor=2)], calibration=Calibration(windows=4, context=64))
    compiled = optx.compile(path, recipe, target="cpu", calibration=text)
    quality = compiled.plan.records[0].quality
    assert quality.kl > 0 and not quality.errors
    prompt = [256, *families.prompt(6)]
    answer = compiled.generate([prompt], optx.Sampling(max_tokens=4))[0]
    seen = list(prompt)
    for token in answer:
        assert int(np.argmax(compiled.logits([seen])[0, -1])) == token
        seen.append(token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of factor"),
        ({"factor": 2, "producer": 1}, "give one of factor"),
        ({"factor": 1}, "factor 1; allowed: 2 to 4"),
        ({"factor": 5}, "factor 5; allowed: 2 to 4"),
        ({"producer": 3}, "producer 3; allowed: -4 to 2"),
        ({"producer": -1}, "producer -1; allowed"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PassError, match=message):
        optx.plan(families.abstract("llama", num_hidden_layers=4), Recipe(structure=[ShareKV(**options)]))


def test_calibration_text_is_asked_for():
    with pytest.raises(OptxError, match="inputs"):
        optx.compile(four(), Recipe(structure=[ShareKV(factor=2)]), target="cpu")
