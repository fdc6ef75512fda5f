"""Who may import whom, and what shared code must not name: read off the source, so that the plan stays true."""

import ast
import functools
import re
from pathlib import Path

import pytest

from optx import registry
from optx.models import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"optx": "optx", "models": "optx.models", "configs": "optx.configs"}

# Rooms (a module or a folder of optx) and the rooms that each may import besides itself. A new room needs a line.
LEAVES = {"errors", "formats", "tensor", "pools", "cache", "near", "ragged", "selection"}
HEAL = {
    "heal_data",
    "heal_loss",
    "heal_memory",
    "heal_ops",
    "heal_phases",
    "heal_plot",
    "heal_run",
    "heal_sample",
    "heal_state",
}
SEARCH = {"search_space", "search_cost", "search_meter", "search_solve"}
ALLOWED: dict[str, set[str] | None] = {  # None: everything but the command line
    # What tensors and caches are.
    "errors": set(),
    "ggml": set(),
    "hadamard": set(),
    "formats": {"errors", "ggml", "hadamard"},
    "tensor": {"errors", "formats"},
    "pools": {"formats", "ragged", "tensor"},
    "selection": set(),
    "eviction": {"errors"},
    "ragged": set(),
    "cache": {"errors", "eviction", "formats", "pools", "ragged", "selection", "tensor"},
    "near": {"cache", "formats", "pools", "tensor"},
    # Ops, parts and models.
    "pallas": LEAVES | {"target"},
    "nn": LEAVES | {"hadamard", "pallas"},
    "models": {"errors", "nn", "checkpoint"},
    "configs": set(),
    # The compiler.
    "ir": {"errors", "tensor"},
    "strict": {"errors"},
    "target": {"errors", "strict"},
    "registry": {"errors"},
    "passes": LEAVES | {"eviction", "hadamard", "nn", "ir", "registry", "watch"},
    "recipe": {"errors", "strict", "registry", "passes", "configs"},
    "verify": LEAVES | {"ir", "pallas"},
    "pipeline": {"errors", "tensor", "ir", "registry", "recipe", "verify"},
    "watch": {"ir"},
    "calibrate": {"cache", "errors", "ir", "nn", "registry", "watch"},
    "resume": {"calibrate", "checkpoint", "errors", "ir", "pipeline", "recipe"},
    "lora": {"ir", "nn"},
    "heal_ops": {"pallas"},
    "heal_loss": {"cache", "ir", "nn"} | HEAL,
    "heal_phases": {"errors", "passes"} | HEAL,
    "heal_data": {"errors", "evaluate", "passes"},
    "heal_sample": {"cache", "checkpoint", "engine", "errors", "ir", "lower", "passes", "target"} | HEAL,
    "heal_state": {"errors", "pipeline", "strict"},
    "heal_plot": {"pipeline", "png_report"} | HEAL,
    "heal_memory": {"errors", "ir", "lora", "passes", "target"} | HEAL,
    "heal_run": {"checkpoint", "errors", "ir", "nn", "passes", "pipeline"} | HEAL,
    "heal": {"checkpoint", "errors", "ir", "lora", "passes", "pipeline", "report", "tensor"} | HEAL,
    "resolve": {"checkpoint", "errors", "quality", "recipe", "registry"},
    "quality": {
        "calibrate",
        "errors",
        "evaluate",
        "heal",
        "ir",
        "lower",
        "pipeline",
        "recipe",
        "registry",
        "resume",
        "watch",
    },
    "bisect": {"checkpoint", "errors", "ir", "lower", "pipeline", "quality", "recipe", "registry"},
    "legality": {"errors", "legality_eviction", "legality_facts", "legality_heads", "legality_scales", "pipeline"}
    | {"legality_selection", "legality_structure", "registry", "recipe"},
    "legality_eviction": {"legality_facts", "passes"},
    "legality_heads": {"legality_facts", "nn", "passes"},
    "legality_scales": {"ir", "legality_facts", "passes", "tensor"},
    "legality_selection": {"legality_facts", "nn", "passes"},
    "legality_structure": {"legality_facts", "nn", "passes"},
    "mla_ranks": {"calibrate", "errors", "ir", "passes", "pipeline", "recipe", "registry"},
    "legality_facts": {"cache", "errors", "formats", "ir", "nn", "passes", "pipeline", "registry", "tensor"},
    "lower": {"cache", "errors", "ir", "pallas", "target", "tensor"},
    "cost": {"cache", "ir", "selection", "target", "tensor"},
    "cost_mesh": {"cache", "errors", "ir", "tensor"},
    "predict": {"cost", "lower", "target"},
    "estimate": {"cost", "cost_mesh", "ir", "predict", "target"},
    "measured": {"errors", "strict"},
    "report": {"ir", "target", "cost", "estimate", "pipeline", "registry"},
    "report_data": {
        *(
            "ir",
            "target",
            "cost",
            "estimate",
            "pipeline",
            "recipe",
            "lower",
            "measured",
            "report",
            "pallas",
            "roofline",
        ),
    },
    "html_report": {"ir", "target", "cost", "estimate", "pipeline", "measured", "report_data", "roofline"},
    "png_report": {"ir", "cost", "estimate", "report_data", "roofline", "target"},
    "roofline": {"cost", "target"},
    "ablate_config": {"configs", "errors", "recipe", "registry", "strict", "target"},
    "ablate_table": {"ir", "report"},
    "ablate_plot": {"ablate_table", "ir"},
    "kept": {"configs", "errors", "strict"},
    "ablate": {"ablate_config", "ablate_table", "api", "checkpoint", "cost", "errors", "evaluate", "ir", "kept"}
    | {"heal", "heal_data", "lower", "optx", "pipeline", "recipe", "registry", "report", "target", "tensor"},
    "plan_table": {"api", "cost", "cost_mesh", "ir", "legality", "report"},
    "slo": {"errors", "ir"},
    "search": {"api", "checkpoint", "errors", "quality", "recipe", "slo", "target"} | SEARCH,
    "search_space": {"errors", "ir", "legality", "passes", "pipeline", "plan_table", "recipe", "registry", "strict"},
    "search_cost": {"cost", "errors", "estimate", "ir", "registry", "slo", "target"} | SEARCH,
    "search_meter": {"calibrate", "errors", "ir", "quality", "registry", "tensor"} | SEARCH,
    "search_solve": SEARCH,
    "learn_rotation": {
        "checkpoint",
        "errors",
        "formats",
        "ir",
        "lower",
        "nn",
        "passes",
        "pipeline",
        "quality",
        "recipe",
    }
    | {"tensor"},
    "search_text": {"report", "search", "slo"},
    # Files and text.
    "checkpoint": LEAVES | {"ggml", "ir", "nn", "recipe", "pipeline", "tokenizer"},
    "detokenize": {"errors"},
    "chat_template": {"errors"},
    "tokenizer": {"errors", "detokenize", "chat_template", "checkpoint"},
    # Running.
    "engine": {"errors", "cache", "pools"},
    "generate": {"errors", "engine", "tokenizer"},
    "compaction": {"errors", "generate", "tokenizer"},
    "conversation": {"compaction", "engine", "errors", "generate", "tokenizer"},
    "grammar": {"errors", "tokenizer"},
    "evaluate": {"errors"},
    "evaluate_paged": {"cache", "engine", "errors", "evaluate"},
    "compilation_cache": set(),
    "serve": {"compaction", "errors", "engine", "generate", "grammar", "tokenizer"},
    # What sees everything.
    "api": None,
    "bench": None,
    "optx": None,
}
# Sees everything; nothing else imports it.
COMMAND_LINE = {
    "cli",
    "cli_bisect",
    "cli_ablate",
    "cli_flags",
    "cli_heal",
    "cli_plan",
    "cli_ranks",
    "cli_report",
    "cli_retrieval",
    "cli_rotate",
    "cli_search",
    "cli_serve",
    "cli_verbs",
    "__main__",
}

NAMELESS = [*sorted((ROOT / "optx" / "engine").glob("*.py")), ROOT / "optx" / "lower.py", ROOT / "optx" / "pipeline.py"]
TECHNIQUES = {
    *(
        "gqa",
        "mqa",
        "mla",
        "mamba",
        "mamba2",
        "ssm",
        "moe",
        "gdn",
        "nsa",
        "kivi",
        "snapkv",
        "h2o",
        "quest",
        "tova",
        "kvzip",
    ),
    *("streamingllm", "awq", "gptq", "quarot", "sliding", "quantize", "quantized", "fused", "eagle", "medusa"),
}

LONGEST = 400  # lines of a file; a kernel's backend file may be longer
BROAD = {
    "optx/tokenizer.py": "tokenizers raises Exception itself and has no type of its own",
    "optx/grammar.py": "the converter of EBNF grammars raises Exception itself",
    "optx/serve/loop.py": "whatever a step raises fails the requests in flight, not the server",
    "optx/bench/aot.py": "whatever lowering or the assembler raises is the result of the case",
    "optx/bench/kernels.py": "a peer that does not run on this device is a line of the table",
    "optx/bench/verify_gpu.py": "whatever lowering, the assembler or a launch raises is the result of the case",
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(name: str, *, top: bool = False) -> set[str]:
    """Modules of optx that a module imports. top: only at its top, when it is imported; else in functions as well."""
    found = set()
    parsed = tree(modules()[name])
    for node in parsed.body if top else ast.walk(parsed):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            paths = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {path if path in modules() else node.module for path in paths}
    return {path for path in found if path.split(".")[0] == "optx"}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def test_the_package_is_found():
    assert len(modules()) > 50 and "optx.models.llama" in modules() and imports("optx.nn.mla") >= {"optx.cache"}
    assert {room(name) for name in modules()} == ALLOWED.keys() | COMMAND_LINE, "a line in ALLOWED for every room"


@pytest.mark.parametrize("name", modules())
def test_imports_stay_within_the_rooms_allowed(name):
    here = room(name)
    if here in COMMAND_LINE:
        return
    allowed = ALLOWED[here]
    for path in imports(name):
        assert room(path) not in COMMAND_LINE, f"{name} imports {path}: nothing imports the command line"
        assert allowed is None or room(path) in allowed | {here}, f"{name} imports {path}"


@pytest.mark.parametrize(
    "name", [name for name in modules() if name.startswith("optx.pallas.") and name.count(".") > 2]
)
def test_kernels_know_types_and_each_other_but_not_the_table(name):
    for path in imports(name):
        kernel = path.startswith("optx.pallas.") and path not in ("optx.pallas.dispatch", "optx.pallas.rows")
        assert kernel or room(path) in ALLOWED["pallas"], f"{name} imports {path}"


def test_the_engine_knows_neither_parts_nor_passes():
    """Also through what it imports: the closure holds no room above the caches."""
    seen, todo = set(), [name for name in modules() if name.startswith("optx.engine")]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imports(name)
    assert {room(name) for name in seen} <= LEAVES | {"engine", "eviction", "ggml", "hadamard"}


def test_imports_make_no_circle():
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in imports(name, top=True) - {name}:
                visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


@functools.cache
def names() -> re.Pattern:
    """Any name of a technique or a family as a word of its own, underscores and digits around it allowed."""
    ours = {name for name, pass_ in registry.PASSES.items() if pass_.apply.__module__.startswith("optx.")}
    models = {name for family in FAMILIES for name in (*family.HF_TYPES, family.GGUF_ARCHITECTURE) if name}
    words = ours | models | {family.__name__.rpartition(".")[2] for family in FAMILIES} | TECHNIQUES
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    return re.compile(rf"(?<![a-z])({'|'.join(longest_first)})(?![a-z])", re.IGNORECASE)


@pytest.mark.parametrize("path", NAMELESS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shared_code_names_no_technique_and_no_family(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = names().search(line)
        assert match is None, f"{path.relative_to(ROOT)}:{number}: names {match[0]!r}: {line.strip()}"


@pytest.mark.parametrize(
    "line, found",
    [
        ("if spec.kind == MLA:", "MLA"),
        ("from optx.passes import quantize_kv", "quantize_kv"),
        ("mamba2_state = 1  # one a row", "mamba2"),
        ('"""As Llama does."""', "Llama"),
        ("is_gemma3_text", "gemma3_text"),
        ("the request asks, and waits", None),
        ("a window and its sinks", None),
    ],
)
def test_names_are_recognised(line, found):
    match = names().search(line)
    assert (match and match[0]) == found


@pytest.mark.parametrize("name", modules())
def test_files_are_short(name):
    path = modules()[name]
    parts = path.relative_to(ROOT).parts
    backend = parts[:2] == ("optx", "pallas") and len(parts) == 4 and parts[3] not in ("reference.py", "__init__.py")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert backend or lines <= LONGEST, f"{'/'.join(parts)} has {lines} lines; allowed: {LONGEST}"


def broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or getattr(kind, "id", None) in ("Exception", "BaseException") for kind in kinds)


@pytest.mark.parametrize("name", modules())
def test_no_broad_except(name):
    path = modules()[name]
    found = [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.ExceptHandler) and broad(n)]
    where = path.relative_to(ROOT).as_posix()
    assert len(found) == (where in BROAD), f"{where}: broad except at lines {found}"


@pytest.mark.parametrize(
    "text, want", [("except:", True), ("except (ValueError, Exception):", True), ("except OSError:", False)]
)
def test_a_broad_except_is_recognised(text, want):
    parsed = ast.parse(f"try:\n    pass\n{text}\n    pass")
    assert broad(parsed.body[0].handlers[0]) == want
