"""The committed matrix of legality: all of it judged on shapes, a covering sample compiled on shapes and verified."""

import collections

import pytest
from nightly import legality as nightly

import optx
from optx import legality
from optx.errors import OptxError

CELLS = {str(cell): cell for cell in nightly.cells()}


def test_every_pass_and_every_family_stands_in_the_matrix():
    absent = nightly.missing()
    assert not absent, (
        f"{', '.join(absent)}: add an entry with `pairs: true` to tests/nightly/passes.yaml, run "
        "`python tests/nightly/legality.py --write`, and read what it wrote before it is committed"
    )
    rows = nightly.committed()
    assert tuple(rows) == nightly.families() and all(row.keys() == CELLS.keys() for row in rows.values())


def test_refusals_are_names_of_facts_or_errors_of_recipes():
    facts = {legality.STACK.name, *(fact.name for fact in legality.FACTS), "RecipeError"}
    verdicts = {verdict for row in nightly.committed().values() for verdict in row.values()} - {nightly.OK}
    idle = {verdict for verdict in verdicts if verdict.startswith("PassError: ") and " changed nothing: " in verdict}
    assert {verdict.partition(":")[0] for verdict in verdicts - idle} <= facts
    for verdict in verdicts - idle:
        name, _, text = verdict.partition(": ")
        assert name == "RecipeError" or f"[{name}; " in text, "the source stands in the refusal"


@pytest.mark.parametrize("family", nightly.families())
def test_the_matrix_is_what_is_judged(family):
    want = nightly.committed()[family]
    found = {name: nightly.judged(nightly.tree(family), cell.recipe) for name, cell in CELLS.items()}
    assert found == want


def sample() -> dict[str, list[str]]:
    """Family -> recipes: every entry of passes.yaml on every family, every pair at least once, few recipes."""
    left = collections.Counter({name: 1 for name, cell in CELLS.items() if len(cell.names) > 1})
    chosen = {}
    for family in nightly.families():
        todo, mine = set(nightly.entries()), []
        while todo:
            new = {name: (len(todo & set(cell.names)), left[name]) for name, cell in CELLS.items()}
            mine.append(max(new, key=new.__getitem__))
            todo -= set(CELLS[mine[-1]].names)
            left[mine[-1]] = 0
        chosen[family] = mine
    apart = [name for name, wanted in left.items() if wanted and len(set(CELLS[name].names)) > 1]
    for i, name in enumerate(apart):  # more pairs than that takes: the rest in turn
        chosen[nightly.families()[i % len(chosen)]].append(name)
    return chosen


SAMPLE = sample()


def test_the_sample_covers():
    taken = [name for names in SAMPLE.values() for name in names]
    passes_of = {family: {part for name in names for part in CELLS[name].names} for family, names in SAMPLE.items()}
    assert all(names == set(nightly.entries()) for names in passes_of.values())
    different = {name for name, cell in CELLS.items() if len(set(cell.names)) > 1}
    assert different <= set(taken)


@pytest.mark.parametrize("family", nightly.families())
def test_a_recipe_of_the_sample_compiles_and_verifies_or_is_refused_as_stated(family):
    want = nightly.committed()[family]
    for name in SAMPLE[family]:
        try:
            planned = optx.plan(nightly.tree(family), CELLS[name].recipe, "h100")
        except OptxError as error:
            assert want[name].endswith(f": {error}")
        else:
            assert want[name] == nightly.OK and len(planned.records) == len(CELLS[name].names)
