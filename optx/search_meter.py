"""What forms cost on calibration text: KL of any choice against the model as it is, by one compiled program.

A form that stores a weight in fewer bits computes what the plain module computes on the rounded weight, so that the program of
the model as it is runs it with other leaves. A form that computes something else (a cache in fewer bits) is one of several that
the program holds, switched by a number. Everything runs through the ops' references.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from optx import ir, quality, tensor
from optx.calibrate import Feed
from optx.errors import SearchError
from optx.quality import Windows
from optx.registry import Seen, SeenBlock
from optx.search_space import Candidate, Choice, Group

NEVER = float("inf")  # of a form that is left out


class Ledger:
    """Measured figures by name, in a file that is written after each of them: what was interrupted goes on from there."""

    def __init__(self, path: Path | None, of: Mapping[str, object]):
        """of: what the figures are of. Raises SearchError where the file holds figures of something else."""
        self.path, self.of, self.figures = path, dict(of), {}
        if path is not None and path.exists():
            self.figures = self._read(path)

    def _read(self, path: Path) -> dict[str, float]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            kept, figures = data["of"], {str(name): float(value) for name, value in data["figures"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SearchError(
                f"{path}: holds no figures of a search ({error}); remove it, or give another --out"
            ) from None
        for name, value in self.of.items():
            if kept.get(name) != value:
                raise SearchError(
                    f"{path}: {name}: was measured with {kept.get(name)!r}, now {value!r}; give another --out, or remove it"
                )
        return figures

    def get(self, name: str, measure) -> float:
        """The figure, measured now where it is not known."""
        if name not in self.figures:
            self.figures[name] = measure()
            self.write()
        return self.figures[name]

    def write(self) -> None:
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"of": self.of, "figures": self.figures}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


class _Forms(nnx.Module):
    """The model, and behind it what its sites may run as; parameters that both hold are one."""

    def __init__(self, model: nnx.Module, forms: Sequence[nnx.Module]):
        self.model = model
        self.forms = nnx.List(forms)


class Meter:
    """Measures choices of forms on calibration text. Holds the model and the logits float32[T, V] of every window."""

    def __init__(self, model: nnx.Module, groups: Sequence[Group], text: Windows, calibration: Windows | None = None):
        """model: concrete, with dense weights. calibration: what calibrated passes see; None: the same text."""
        self.model, self.groups, self.text = model, groups, text
        self.seen = _seen(model, groups, text if calibration is None else calibration)
        self.numbers: dict[tuple[str, Candidate], int] = {}  # switched forms, from 1 at each path
        modules: dict[str, list[nnx.Module]] = {}
        for group in groups:
            for candidate in group.forms:
                for path in group.sites:
                    if not _stores_only(candidate, path, model):
                        forms = modules.setdefault(path, [])
                        forms.append(self._applied(candidate, path))
                        self.numbers[path, candidate] = len(forms)
        self.paths = tuple(modules)
        graph, state = nnx.split(_Forms(model, [form for forms in modules.values() for form in forms]))
        self.leaves, treedef = jax.tree.flatten(state)
        self.places = {id(leaf): i for i, leaf in enumerate(self.leaves)}
        counts = {path: len(forms) for path, forms in modules.items()}

        @jax.jit
        def run(leaves, chosen, tokens, base):
            both = nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
            rest = iter(both.forms)
            forms = {path: [next(rest) for _ in range(count)] for path, count in counts.items()}
            quality.switch(both.model, forms, {path: chosen[i] for i, path in enumerate(counts)})
            return quality.divergence(base, both.model(tokens)[0], tokens)[0]

        plain = jax.jit(lambda leaves, tokens: nnx.merge(graph, jax.tree.unflatten(treedef, leaves)).model(tokens)[0])
        self.run = run
        self.base = [plain(self.leaves, tokens) for tokens in text]

    def kl(self, choice: Choice) -> float:
        """KL(as it is || choice), nats a token."""
        leaves, chosen = list(self.leaves), np.zeros(len(self.paths), np.int32)
        for group, index in zip(self.groups, choice, strict=True):
            for path in group.sites if index else ():
                number = self.numbers.get((path, group.form(index)))
                if number is not None:
                    chosen[self.paths.index(path)] = number
                    continue
                for old, new in self._changed(group.form(index), path):
                    leaves[self.places[id(old)]] = new
        sums = [self.run(leaves, chosen, tokens, base) for tokens, base in zip(self.text, self.base, strict=True)]
        return float(np.sum(jax.device_get(sums), dtype=np.float64)) / sum(tokens.shape[1] - 1 for tokens in self.text)

    def error(self, group: Group, index: int) -> float:
        """|W' - W| / |W| over all weights of the group's sites; 0 where the form stores them as they are."""
        changed = whole = 0.0
        for path in group.sites:
            whole += sum(float(_square(leaf)) for leaf in jax.tree.leaves(nnx.state(ir.get(self.model, path))))
            for old, new in self._changed(group.form(index), path):
                changed += float(_square(new.astype(jnp.float32) - old.astype(jnp.float32)))
        return (changed / max(whole, np.finfo(np.float64).tiny)) ** 0.5

    def _applied(self, candidate: Candidate, path: str) -> nnx.Module:
        seen = self.seen.get(path) if candidate.options.needs else None
        return candidate.apply(path, ir.get(self.model, path), len(self.model.layers), seen)

    def _changed(self, candidate: Candidate, path: str) -> list[tuple[jax.Array, jax.Array]]:
        """(array as it is, the one in its place) of every parameter that the form stores otherwise."""
        old, new = (ir.params(module) for module in (ir.get(self.model, path), self._applied(candidate, path)))
        pairs = [(old[name].get_raw_value(), new[name].get_raw_value()) for name in old]
        return [(was, tensor.dense(now)) for was, now in pairs if now is not was]


def _seen(model: nnx.Module, groups: Sequence[Group], text: Windows) -> dict[str, Seen | SeenBlock]:
    """What calibrated candidates need of their sites' inputs, all blocks being as they are."""
    asking = [(group, form) for group in groups for form in group.forms if form.options.needs]
    needs = frozenset().union(*(form.options.needs for _, form in asking))
    paths = {path for group, _ in asking for path in group.sites}
    found: dict[str, Seen | SeenBlock] = {}
    feed = Feed(model, text) if needs else None
    for prefix, block in ir.children(model) if needs else ():
        sites = [path.removeprefix(prefix).strip("/") for path in paths if f"{path}/".startswith(f"{prefix}/")]
        found |= feed.collect(block, prefix, sites, needs) if sites else {}
        feed.advance(block, prefix)
    return found


@jax.jit
def _square(x):
    return jnp.sum(x.astype(jnp.float32) ** 2)


def _stores_only(candidate: Candidate, path: str, model: nnx.Module) -> bool:
    """Whether the form differs from the module in how weights are stored, and in nothing else."""
    module = ir.abstract(ir.get(model, path))
    return ir.signature(_plain(candidate.apply(path, module, len(model.layers)))) == ir.signature(module)


def _plain(module: nnx.Module) -> nnx.Module:
    """The module with all parameters dense; abstract."""
    out = ir.shallow(module)
    for path, variable in ir.params(module).items():
        value = variable.get_raw_value()
        if tensor.is_packed(value):
            parent, _, name = path.rpartition("/")
            part = ir.get(out, parent)
            vars(part)[name] = vars(ir.replace(part, **{name: tensor.lift(tensor.dense, value)}))[name]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivities:
    """KL of each group alone in each of its forms, 0 being as it is; `NEVER` for a form that is left out."""

    kl: tuple[np.ndarray, ...]  # float64[1 + forms] a group

    def of(self, choice: Choice) -> float:
        """The sum over the groups: what a choice costs to first order."""
        return float(sum(row[index] for row, index in zip(self.kl, choice, strict=True)))


def sensitivities(
    meter: Meter, sizes: Sequence[np.ndarray], ledger: Ledger, *, measured: int | None = None, progress: bool = False
) -> Sensitivities:
    """Every group alone in every form that is worth it. sizes: bytes of each group in each form, 0 being as it is.

    A form is left out where another of the same pass is as small and rounds the group's weights no worse. measured: forms a group
    that are run on the text, spread over its ladder; those between follow from their errors, KL ~ error^2 at the nearest measured
    one (Malinovskii et al. 2024, arXiv:2411.17525, theorem 1). None: all of them.
    """
    work = [(g, index) for g, group in enumerate(meter.groups) for index in range(1, 1 + len(group.forms))]
    rows = tuple(np.append(0.0, np.full(len(group.forms), NEVER)) for group in meter.groups)
    errors = tuple(np.zeros_like(row) for row in rows)
    for g, index in tqdm(work, desc="weight errors", unit="form", disable=not progress):
        group = meter.groups[g]
        name = f"error | {group.where} | {group.form(index).label}"
        errors[g][index] = ledger.get(name, functools.partial(meter.error, group, index))
    kept = [
        [index for index in range(1, len(rows[g])) if not _beaten(group, index, errors[g], sizes[g])]
        for g, group in enumerate(meter.groups)
    ]
    run = [(g, index) for g, indices in enumerate(kept) for index in _spread(indices, errors[g], measured)]
    for g, index in tqdm(run, desc="sensitivities", unit="form", disable=not progress):
        alone = tuple(index if i == g else 0 for i in range(len(meter.groups)))
        rows[g][index] = ledger.get(name_of(meter.groups, alone), functools.partial(meter.kl, alone))
    for g, indices in enumerate(kept):
        known = {index: rows[g][index] for index in indices if np.isfinite(rows[g][index]) and errors[g][index]}
        for index in indices:
            if not np.isfinite(rows[g][index]) and known:
                ratio = {other: errors[g][index] / errors[g][other] for other in known}
                nearest = min(ratio, key=lambda other: abs(np.log(ratio[other])))
                rows[g][index] = known[nearest] * ratio[nearest] ** 2
    return Sensitivities(kl=rows)


def _spread(indices: Sequence[int], errors: np.ndarray, count: int | None) -> list[int]:
    """`count` of the forms, evenly over their errors' order, and all that store weights as they are."""
    rounded = sorted((index for index in indices if errors[index]), key=lambda index: errors[index])
    if count is not None and count < len(rounded):
        middle = (np.arange(count) + 0.5) * len(rounded) / count
        rounded = [rounded[int(place)] for place in middle]
    return [index for index in indices if not errors[index] or index in rounded]


def name_of(groups: Sequence[Group], choice: Choice) -> str:
    """A choice in words, for the ledger."""
    chosen = [(g, g.form(index)) for g, index in zip(groups, choice, strict=True) if index]
    return "kl | " + "; ".join(f"{group.where} | {form.label}" for group, form in chosen)


def _beaten(group: Group, index: int, errors: np.ndarray, sizes: np.ndarray) -> bool:
    """By another form of the same pass; of two that are equal in both, the later one. Forms that store weights as they are
    have no error to compare."""
    if not errors[index]:
        return False
    mine = errors[index], sizes[index]
    for other in range(1, len(errors)):
        theirs = errors[other], sizes[other]
        alike = other != index and group.form(other).pass_ is group.form(index).pass_
        if alike and theirs[0] <= mine[0] and theirs[1] <= mine[1] and (theirs != mine or other < index):
            return True
    return False
