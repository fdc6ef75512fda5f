"""`optx report`: what a compile did, or what a recipe would do, as text or as one HTML page."""

from pathlib import Path

import optx
from optx import target as targets
from optx.checkpoint.export import how_made, is_export
from optx.cli_flags import Flag, Verb
from optx.cost import step_bytes
from optx.errors import RequestError, UsageError
from optx.estimate import estimate
from optx.html_report import Subject, page
from optx.models import by_hf_type
from optx.recipe import Recipe
from optx.report import estimate_text, step_text


def report(model: str, *, weights, dtype, recipe, target, batch, context, html, overwrite) -> None:
    if html is not None:
        _check_file(Path(html), overwrite)  # before the work, not after
    if is_export(Path(model)):
        _check_export(model, recipe, dtype, weights)
        subject = of_export(Path(model), target)
    else:
        chosen = None if recipe is None else Recipe.from_yaml(recipe)
        subject = of_plan(optx.plan(optx.load(model, weights, dtype), chosen, target or "auto"))
    if html is None:
        print(text(subject, batch, context))
        return
    try:
        Path(html).write_text(page(subject, batch=batch, context=context), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--html {html}: cannot be written: {error.strerror or error}") from None
    print(f"{subject.title} for {subject.target}: written to {html}; open it in a browser")


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


def _check_export(model: str, recipe, dtype, weights) -> None:
    """An export has its recipe, dtype and formats already. Raises UsageError."""
    for name, given in (("recipe", recipe), ("dtype", dtype), ("weights", weights != "dense" and weights)):
        if given:
            raise UsageError(f"report: {model} is an optx export and has its {name}; leave --{name} out")


def verb(model_flags: tuple[Flag, ...], recipe: Flag, target: Flag, overwrite: Flag) -> Verb:
    return Verb(
        name="report",
        line="what a compile did, or a recipe would do, as text or as one HTML page with charts",
        arguments=("DIR|MODEL|CONFIG",),
        flags=(
            Flag(name="html", value="FILE", help="write the page there; it needs no network and no other file"),
            recipe,
            Flag(**{**vars(target), "default": None, "help": f"{target.help} (default: the export's, or auto)"}),
            Flag(name="batch", kind=int, default=1, least=1, value="N", help="sequences decoded at once"),
            Flag(name="context", kind=int, least=1, value="N", help="tokens of each sequence (default: the model's)"),
            Flag(**{**vars(overwrite), "help": "replace what stands at --html"}),
            *model_flags,
        ),
        examples=(
            "optx report compiled --html report.html",
            "optx report qwen3-8b --recipe int4_kv8 --target h100 --context 40960 --html report.html",
        ),
        notes="Of an export, times and errors are those of its compile. Of a model or a config.json, the recipe is run on "
        "shapes: no weights are read.",
        run=report,
    )
