"""`optx report`: what a compile did, or what a recipe would do, as text, JSON, charts, or one HTML page."""

import json as json_text
import sys
from collections.abc import Sequence
from pathlib import Path

import optx
from optx import measured as times
from optx import png_report
from optx import target as targets
from optx.checkpoint.export import how_made, is_export
from optx.cli_flags import Flag, Verb
from optx.cost import step_bytes
from optx.errors import RequestError, UsageError
from optx.estimate import estimate
from optx.models import by_hf_type
from optx.recipe import Recipe
from optx.report import estimate_text, step_text
from optx.report_data import Subject, figures


def report(model: str, *, weights, dtype, recipe, target, batch, context, html, png, measured, json, overwrite) -> None:
    if html is not None:
        _check_file(Path(html), overwrite)  # before the work, not after
    if png is not None:
        _check_folder(Path(png), overwrite)
    if measured and not (html or json):
        raise UsageError("report: --measured goes with --html or --json")
    read = times.read(Path(measured)) if measured else None
    if is_export(Path(model)):
        _check_export(model, recipe, dtype, weights)
        subject = of_export(Path(model), target)
    else:
        chosen = None if recipe is None else Recipe.from_yaml(recipe)
        subject = of_plan(optx.plan(optx.load(model, weights, dtype), chosen, target or "auto"))
    steps = () if read is None else _steps_of(subject, read, measured)
    if json:
        shown = figures(subject, batch=batch, context=context, measured=steps)
        print(json_text.dumps(shown, indent=2, ensure_ascii=False))
    elif html is None:
        print(text(subject, batch, context))
    if html is not None:
        how = "" if read is None else _how(read)
        from optx.html_report import page  # jinja is slow to import

        _write(Path(html), page(subject, batch=batch, context=context, measured=steps, how=how))
        _tell(f"{subject.title} for {subject.target}: written to {html}; open it in a browser", json)
    if png is not None:
        Path(png).mkdir(exist_ok=True)
        written = png_report.write(subject, Path(png), batch=batch, context=context)
        _tell(f"{subject.title} for {subject.target}: {', '.join(path.name for path in written)} in {png}", json)


def _steps_of(subject: Subject, read: times.Measured, name: str) -> Sequence[times.StepTimes]:
    """Raises RequestError when none is of the subject."""
    mine = [step for step in read.steps if (step.model, step.recipe) == (subject.model, subject.recipe.name)]
    if not mine:
        there = ", ".join(dict.fromkeys(f"{step.model} + {step.recipe}" for step in read.steps))
        raise RequestError(
            f"--measured {name}: no step of {subject.model} + {subject.recipe.name}; it has {there or 'no steps'}"
        )
    return sorted(mine, key=lambda step: (step.batch, step.context))


def _how(read: times.Measured) -> str:
    by = f"efficiencies ({read.source})" if read.source else "bounds alone: what its kernels reach was not measured"
    return f"Measured on {read.device}, {read.date}; predicted for {read.target} by {by}."


def _tell(line: str, json: bool) -> None:
    """Where JSON goes to stdout, notes do not."""
    print(line, file=sys.stderr if json else sys.stdout)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--html {path}: cannot be written: {error.strerror or error}") from None


def of_export(folder: Path, target: str | None = None) -> Subject:
    """An export's passes, as its manifest keeps them. target None: the one that it was compiled for, or this machine."""
    made = how_made(folder, by_hf_type)
    kept = made.target if made.target in targets.names() else None
    compiled_for = made.target or "not kept (written by an earlier optx)"
    return Subject(
        model=made.origin.name,
        recipe=made.recipe,
        target=targets.get(target or kept or "auto"),
        trees=made.trees,
        records=made.records,
        timed=made.timed,
        file_bytes=made.origin.bytes,
        provenance=(
            ("export", folder.resolve().name),
            ("compiled for", compiled_for),
            *_origin(made.origin),
            ("weights", f"{made.files:,} files, a sha256 of each in manifest.json"),
            *((f"{name}", version) for name, version in made.versions.items()),
        ),
    )


def of_plan(plan: "optx.Plan") -> Subject:
    """A recipe run on shapes."""
    origin = plan.source.origin
    return Subject(
        model=origin.name,
        recipe=plan.recipe,
        target=plan.target,
        trees=plan.trees,
        records=plan.records,
        timed=False,
        file_bytes=origin.bytes,
        provenance=(("made from", "shapes; no weights were read"), *_origin(origin), ("optx", optx.__version__)),
    )


def _origin(origin) -> tuple[tuple[str, str], ...]:
    kind = {"hf": "Hugging Face checkpoint" if origin.bytes else "config.json", "gguf": "GGUF file"}
    return (
        ("source", f"{origin.name}, {kind.get(origin.kind, origin.kind)}"),
        ("architecture", str(origin.config.get("model_type", "a module of its own"))),
        ("dtype", origin.dtype),
        *([("files", f"{origin.bytes:,} B")] if origin.bytes else []),
        *([("packed in the files", f"{len(origin.formats):,} parameters")] if origin.formats else []),
    )


def text(subject: Subject, batch: int = 1, context: int | None = None) -> str:
    """The report's figures without charts."""
    context = context or subject.trees[-1].context
    steps = [step_bytes(tree, batch, context) for tree in subject.trees]
    bounds = estimate(subject.trees[-1], subject.target, batch=batch, context=context)
    parts = [f"{subject.report}", step_text(subject.records, steps, subject.target), estimate_text(bounds)]
    if subject.records and not subject.timed:
        parts.append("times and errors of passes: on shapes alone; a compile measures them")
    return "\n\n".join(parts)


def _check_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise UsageError(f"report: --html {path}: is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise UsageError(f"report: --html {path}: exists; choose another name, or --overwrite")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"report: --html {path}: the folder {path.parent} does not exist; make it first")


def _check_folder(path: Path, overwrite: bool) -> None:
    there = [name for name in png_report.FILES if (path / f"{name}.png").exists()]
    if path.exists() and not path.is_dir():
        raise UsageError(f"report: --png {path}: is a file; name a folder")
    if there and not overwrite:
        raise UsageError(f"report: --png {path}: has a {there[0]}.png; choose another folder, or --overwrite")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"report: --png {path}: the folder {path.parent} does not exist; make it first")


def _check_export(model: str, recipe, dtype, weights) -> None:
    """An export has its recipe, dtype and formats already. Raises UsageError."""
    for name, given in (("recipe", recipe), ("dtype", dtype), ("weights", weights != "dense" and weights)):
        if given:
            raise UsageError(f"report: {model} is an optx export and has its {name}; leave --{name} out")


def verb(model_flags: tuple[Flag, ...], recipe: Flag, target: Flag, overwrite: Flag, json: Flag) -> Verb:
    return Verb(
        name="report",
        line="what a compile did, or a recipe would do, as text, JSON, charts, or one HTML page",
        arguments=("DIR|MODEL|CONFIG",),
        flags=(
            Flag(name="html", value="FILE", help="write the page there; it needs no network and no other file"),
            Flag(name="png", value="DIR", help="write its charts there as PNG files: bytes, rooflines, layers"),
            Flag(
                name="measured", value="FILE", help="times of decode steps: of `optx bench decode --against-plan --out`"
            ),
            recipe,
            Flag(**{**vars(target), "default": None, "help": f"{target.help} (default: the export's, or auto)"}),
            Flag(name="batch", kind=int, default=1, least=1, value="N", help="sequences decoded at once"),
            Flag(name="context", kind=int, least=1, value="N", help="tokens of each sequence (default: the model's)"),
            Flag(**{**vars(overwrite), "help": "replace what stands at --html and --png"}),
            *model_flags,
            json,
        ),
        examples=(
            "optx report compiled --html report.html",
            "optx report compiled --png charts",
            "optx report qwen3-8b --recipe fused --target h100 --measured against.json --html report.html",
            "optx report qwen3-8b --recipe int4_kv8 --target h100 --context 40960 --html report.html",
        ),
        notes="Of an export, times and errors are those of its compile. Of a model or a config.json, the recipe is run on "
        "shapes: no weights are read. Keys of the JSON: optx/report_data.py.",
        run=report,
    )
