"""Plans as text: recipes and targets side by side, and what legality read off a tree and judged."""

import re
from collections.abc import Mapping, Sequence

from optx import ir
from optx.api import Plan
from optx.cost import step_bytes
from optx.cost_mesh import Mesh
from optx.ir import size_text
from optx.legality import Judgement
from optx.report import table

HEADER = (
    *("recipe", "target", "weights", "KV a token", "bytes a step", "memory", "fits"),
    *("most sequences", "longest context", "TPOT ms", "TTFT ms", "tokens/s", "$/M tokens", "TPOT predicted"),
)
FACTS_HEADER = ("fact", "value", "layers", "at")
UNKNOWN = "-"  # a figure that the target's row does not tell


def side_by_side(plans: Sequence[Plan], batch: int = 1, context: int | None = None, mesh: Mesh = Mesh()) -> str:
    """A row for each plan: bytes of one decode step of `batch` sequences, and bounds on time and price on its target.

    context: tokens of each sequence; None: the model's. Memory is of one device of the mesh.
    """
    tree, devices = plans[0].tree, "" if mesh.devices == 1 else f" on {mesh.devices} devices ({mesh})"
    many = "one sequence" if batch == 1 else f"each of {batch:,} sequences"
    title = f"{plans[0].source.origin.name}: a new token for {many} of {context or tree.context:,} tokens{devices}"
    notes = (
        "Times and prices are bounds that no program beats; TTFT is of one prompt of as many tokens. TPOT predicted, in ms "
        "too, is by what the kernels were measured to reach on the target, where they were."
    )
    rows = [_row(plan, batch, context or plan.tree.context, mesh) for plan in plans]
    return f"{title}\n\n{table(HEADER, rows)}\n\n{notes}"


def _row(plan: Plan, batch: int, context: int, mesh: Mesh) -> list[str]:
    step, bounds = step_bytes(plan.tree, batch, context), plan.estimate(batch, context, mesh)
    room = plan.target.memory
    return [
        (plan.source.recipe or plan.recipe).name,
        plan.target.name,
        size_text(ir.weight_bytes(plan.tree)),
        f"{step.kv_token:,.0f} B",
        size_text(step.total),
        size_text(bounds.held),
        UNKNOWN if room is None else "yes" if bounds.held <= room else "no",
        _number(bounds.largest_batch, ",d"),
        _number(bounds.largest_context, ",d"),
        _number(bounds.tpot, ",.4g", 1e3),
        _number(bounds.ttft, ",.4g", 1e3),
        _number(bounds.tokens_per_second, ",.5g"),
        _number(bounds.dollars_per_million, ",.3g"),
        _number(bounds.predicted and bounds.predicted.seconds, ",.4g", 1e3),
    ]


def _number(value: float | None, form: str, times: float = 1) -> str:
    return UNKNOWN if value is None else format(value * times, form)


def why_text(name: str, readings: Mapping[str, Mapping[str, Sequence[str]]], judged: Sequence[Judgement]) -> str:
    """What `legality.readings` and `legality.judge` say of a recipe on a model. name: of both."""
    rows = [
        [fact, value, f"{len(paths)}", folded(paths)]
        for fact, values in readings.items()
        for value, paths in values.items()
    ]
    lines = [f"facts that legality reads off {name}", table(FACTS_HEADER, rows), "", "refusals"]
    for refusal in judged:
        lines += [f"  {refusal.name}: {_verdict(refusal)}", f"    why: {refusal.why}", f"    fix: {refusal.fix}"]
        lines += [f"    source: {refusal.source}"]
        lines += [f"    override: {refusal.override + ' in the recipe' if refusal.override else 'none'}"]
    return "\n".join(lines)


def _verdict(refusal: Judgement) -> str:
    if not refusal.where:
        return "does not hold"
    of = f" for {' and '.join(refusal.passes)}" if refusal.passes else ""
    verdict = "allowed by the recipe" if refusal.allowed else "refused"
    return f"holds{of} at {folded(refusal.where)} ({', '.join(refusal.got)}): {verdict}"


def why_dict(readings: Mapping[str, Mapping[str, Sequence[str]]], judged: Sequence[Judgement]) -> dict:
    """The same as plain data, paths in full."""
    facts = [
        {"fact": fact, "value": value, "paths": list(paths)}
        for fact, values in readings.items()
        for value, paths in values.items()
    ]
    refusals = [
        {
            "name": refusal.name,
            "holds": bool(refusal.where),
            "refused": refusal.refused,
            "passes": list(refusal.passes),
            "where": list(refusal.where),
            "got": list(refusal.got),
            "why": refusal.why,
            "fix": refusal.fix,
            "source": refusal.source,
            "override": refusal.override,
        }
        for refusal in judged
    ]
    return {"facts": facts, "refusals": refusals}


SHOWN = 6  # runs of indices that are listed


def folded(paths: Sequence[str]) -> str:
    """Paths that differ in the index of their layer alone, as one: `layers/0-5,7/mixer`. Others stand one by one."""
    groups: dict[tuple[str, str], list[int | None]] = {}
    for path in paths:
        match = re.fullmatch(r"(layers/)(\d+)(/.*|)", path)
        groups.setdefault((match[1], match[3]) if match else (path, ""), []).append(match and int(match[2]))
    return ", ".join(f"{head}{'' if None in found else _runs(found)}{tail}" for (head, tail), found in groups.items())


def _runs(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    text = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return ",".join(text) if len(text) <= SHOWN else f"{','.join(text[:SHOWN])},...,{text[-1]}"
