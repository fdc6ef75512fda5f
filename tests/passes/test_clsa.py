"""clsa: layers of a run read the blocks that their first one has chosen, in every form of a step, without an index each."""

import functools

import calibrated
import families
import numpy as np
import pytest
import selecting

import optx
from optx import ir
from optx.cost import step_bytes
from optx.engine.engine import Engine
from optx.errors import LegalityError, PassError
from optx.passes.clsa import Clsa
from optx.passes.gptq import GPTQ
from optx.passes.moba import Moba
from optx.pools import PICKED
from optx.recipe import Recipe

SMALL = Moba(block=selecting.P, top_k=3)


@functools.cache
def compiled(every=2, rule=SMALL, layers=4):
    model = families.concrete("llama", num_hidden_layers=layers)
    return optx.compile(model, Recipe(attention=(rule, Clsa(every=every))))


def test_exact_where_all_blocks_are_chosen():
    tree, tokens = compiled(rule=Moba(block=selecting.P, top_k=6)).tree, families.prompt(23)
    want = families.forward(families.concrete("llama", num_hidden_layers=4), tokens)
    assert families.relative(families.forward(tree, tokens), want) < 1e-4
    assert families.relative(families.incremental(tree, tokens, page_size=selecting.P), want) < 1e-4


@pytest.mark.parametrize("every, owners", [(2, [0, 0, 2, 2]), (3, [0, 0, 0, 3])])
def test_layers_read_what_the_first_has_chosen(every, owners, monkeypatch):
    """Seen at their calls: a follower is handed the choice of its layer, and no other layer's."""
    tree, seen = compiled(every).tree, []
    for i, layer in enumerate(tree.layers):
        kind = type(layer.mixer.select)

        def note(self, attn, x, q, pool, *args, call=kind.__call__):
            out = call(self, attn, x, q, pool, *args)
            seen.append(np.asarray(pool[PICKED]) if PICKED in pool else None)
            return out

        if i in (0, 1):
            monkeypatch.setattr(kind, "__call__", note)
    families.forward(tree, families.prompt(30))
    followers = [i for i, owner in enumerate(owners) if owner != i]
    assert all((seen[i] == seen[owners[i]]).all() for i in followers)
    assert (seen[0] != seen[max(owners)]).any(), "layers choose differently here"


@pytest.mark.parametrize("sizes", [(1,), (13, 1, 2, 9)])
def test_chunks_and_decodes_are_the_forward(sizes):
    tree, tokens = compiled().tree, families.prompt(37)
    want = families.forward(tree, tokens)
    assert families.relative(families.incremental(tree, tokens, sizes, page_size=selecting.P), want) < 1e-5


@pytest.mark.parametrize("way", ["mixed", "speculated"])
def test_the_engine_answers_as_the_forward(way):
    engine = Engine(compiled().program, selecting.WAYS[way])
    assert selecting.answers(engine) == selecting.greedy(compiled().tree)


def test_bytes_of_the_index_are_those_of_half_the_layers():
    tree, alone = (
        compiled().tree,
        optx.plan(families.abstract("llama", num_hidden_layers=4), Recipe(attention=[SMALL])).tree,
    )
    assert step_bytes(alone, 1, 1000).kv == 4 * (128 * 12 + 64 / 4 * 1000)
    assert step_bytes(tree, 1, 1000).kv == 4 * 128 * 12 + 2 * 64 / 4 * 1000
    assert [len(layer.mixer.cache.streams) for layer in tree.layers] == [3, 2, 3, 2]


def test_calibration_goes_on_behind_it():
    """Block by block, with the choice of the layer before: weights as where the whole model runs."""
    model = families.concrete("llama")
    recipe = Recipe(attention=[SMALL, Clsa()], weights=[GPTQ(match="layers/1/.*", format="int4", group=16)])
    tree, _ = calibrated.through(model, recipe)
    assert "int4" in ir.describe(tree.layers[1]) and np.isfinite(families.forward(tree, families.prompt(30))).all()


def test_an_export_reloads(tmp_path):
    folder, _ = families.hf_dir(tmp_path / "hf", "llama", add_bos=False)
    made = optx.compile(optx.load(folder), Recipe(attention=[SMALL, Clsa()]))
    again, tokens = optx.compile(optx.load(optx.export(made, tmp_path / "out"))), families.prompt(30)
    np.testing.assert_array_equal(again.logits([tokens])[0], made.logits([tokens])[0])


@pytest.mark.parametrize(
    "rules, error, told",
    [
        ((SMALL, Clsa(every=1)), PassError, "clsa: every 1; allowed: 2 to 2147483647 layers"),
        ((Clsa(),), PassError, "clsa changed nothing: chooses no blocks by mean keys: list moba before"),
        ((Moba(match="layers/1/.*"), Clsa()), LegalityError, "no_layer_to_choose"),
        ((Moba(match="layers/0/.*", top_k=4), Moba(), Clsa()), LegalityError, "no_layer_to_choose"),
    ],
    ids=["every", "alone", "no chooser", "other blocks"],
)
def test_what_does_not_go_together(rules, error, told):
    with pytest.raises(error, match=told):
        optx.plan(families.abstract("llama"), Recipe(attention=rules))
