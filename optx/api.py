"""load, plan, compile: the public interface."""

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from optx import evaluate, evaluate_paged, heal, ir, legality, lower, pipeline, quality
from optx import target as targets
from optx.checkpoint import export as exports
from optx.checkpoint.export_ct import write_compressed_tensors
from optx.checkpoint.export_deepseek import write_deepseek
from optx.checkpoint.export_hf import write_hf
from optx.checkpoint.source import Source, from_module, open_config, open_gguf, open_hf
from optx.configs import model_names, model_path
from optx.cost import StepBytes, step_bytes
from optx.cost_mesh import Mesh
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Completion, Sampling, token_ids
from optx.engine.speculation import Speculation
from optx.errors import CheckpointError, PassError, RequestError, did_you_mean, no_such_path
from optx.estimate import Estimate, estimate
from optx.generate import Message, OnText, Prompt, encode, encode_chat, generate
from optx.models import by_gguf_architecture, by_hf_type
from optx.pipeline import Dump, Instrument, Record
from optx.recipe import Recipe
from optx.report import Report, estimate_text, kept, record_dict, step_text
from optx.resolve import resolved
from optx.target import Target
from optx.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("dense", "packed")
ALIKE = 0.99  # of a vocabulary, for a draft model's to be the same: special tokens may differ


def load(model: str | Path, weights: str = "dense", dtype: str | None = None) -> Source:
    """A model by path, name or hub id, without reading its weights.

    model: an HF directory, a GGUF file, an optx export, a bare config.json (`load_config`), the name of a config that
    ships with optx (`optx.configs.model_names()`; shapes only), or a hub id (downloaded when online).
    weights: "dense", or "packed" to keep the blocks of a GGUF file or of an MXFP4 checkpoint as they are in memory.
    dtype: of dense weights and activations; None: the checkpoint's own, float32 for GGUF.
    Raises: CheckpointError, ConfigError.
    """
    if weights not in WEIGHTS:
        raise CheckpointError(f"weights={weights!r}; allowed: {', '.join(map(repr, WEIGHTS))}")
    _check_dtype(dtype)
    path = Path(model)
    try:
        if not path.exists():
            path = model_path(str(model)) if str(model) in model_names() else _from_hub(str(model))
        if path.is_file() and path.suffix != ".json":
            return open_gguf(path, by_gguf_architecture, dtype=dtype or "float32", packed=weights == "packed")
        if path.is_file():
            return open_config(path, by_hf_type, dtype=dtype, allowed=DTYPES, packed=weights == "packed")
        if exports.is_export(path):
            if dtype is not None or weights == "packed":
                what = "the dtype it was compiled with; leave dtype" if dtype else "its weights' formats; leave weights"
                raise CheckpointError(f"{path}: an optx export keeps {what} out")
            return exports.open_export(path, by_hf_type)
        return open_hf(path, by_hf_type, dtype=dtype, packed=weights == "packed")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def load_config(path: str | Path, dtype: str | None = None) -> Source:
    """A model by its config.json alone, to describe and plan: it has shapes and no weights.

    dtype: None for the config's own, float32 where it names none. Raises: CheckpointError, ConfigError.
    """
    _check_dtype(dtype)
    return open_config(Path(path), by_hf_type, dtype=dtype, allowed=DTYPES)


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")


def _from_hub(name: str) -> Path:
    """Downloads a hub id's safetensors, config and tokenizer. Raises CheckpointError when it cannot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    looks_local = name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).parent.is_dir()
    if looks_local or name.endswith((".gguf", ".yaml", ".json")):
        raise CheckpointError(no_such_path(name) + _near_config(name))
    patterns = ["*.safetensors", "*.json", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: no such path, and the hub gave no model of this name: {first}") from None


def _near_config(name: str) -> str:
    """What to add to an error about a path that may be meant as a shipped config's name."""
    near = difflib.get_close_matches(name.lower(), model_names(), n=3, cutoff=0.6)
    if near:
        return f"; configs that ship with optx under such a name: {', '.join(near)}"
    return "" if {"/", "."} & set(name) else "; optx.configs.model_names() lists the configs that ship with optx"


def as_source(model: "Source | nnx.Module | str | Path") -> Source:
    """What `plan` and `compile` take: a loaded model, a path, or a user's own module built from `optx.nn` parts."""
    if isinstance(model, Source):
        return model
    if isinstance(model, nnx.Module):
        missing = [name for name in ("backbone", "head", "layers", "cache_plan", "context") if not hasattr(model, name)]
        if missing:
            raise PassError(f"{type(model).__name__} lacks {', '.join(missing)}; build on optx.nn.CausalLM")
        return from_module(model, type(model).__name__)
    return load(model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe run on shapes: no weights were read. `trees[0]` is the input, `trees[-1]` the result."""

    source: Source
    recipe: Recipe
    target: Target
    trees: tuple[nnx.Module, ...]
    records: tuple[Record, ...]

    @property
    def tree(self) -> nnx.Module:
        return self.trees[-1]

    @property
    def name(self) -> str:
        """`model + recipe`, or the model alone without one."""
        recipe = self.source.recipe or (self.recipe if self.recipe.steps() else None)
        return f"{self.source.origin.name} + {recipe.name}" if recipe else self.source.origin.name

    def bytes_per_token(self, batch: int = 1, context: int = 1) -> dict[str, float]:
        """Bytes that one decode step reads: weights (the input embedding is not, unless tied; of experts those that the
        batch is expected to take, with uniform routing) and KV."""
        step = step_bytes(self.tree, batch, context)
        return {"weights": step.weights, "kv": step.kv}

    def steps(self, batch: int = 1, context: int | None = None) -> list[StepBytes]:
        """Bytes of one decode step on every tree: before the first pass, after each. context None: the model's."""
        return [step_bytes(tree, batch, context or self.tree.context) for tree in self.trees]

    def estimate(self, batch: int = 1, context: int | None = None, mesh: Mesh = Mesh()) -> Estimate:
        """Bounds of the result on the target: TPOT, TTFT, tokens/s, what fits, which wall binds, energy, dollars.

        Raises UsageError for a mesh that the model does not divide into.
        """
        return estimate(self.tree, self.target, batch=batch, context=context or self.tree.context, mesh=mesh)

    def text(self, batch: int = 1, context: int | None = None, mesh: Mesh = Mesh()) -> str:
        """Bytes before and after each pass as a table, with the bound on the step's time; the result's bounds by op."""
        title = f"{self.name} for {self.target}\n{ir.summary(self.tree)}"
        steps = step_text(self.records, self.steps(batch, context), self.target, mesh.devices)
        return f"{title}\n\n{steps}\n\n{heal.plan_text(self)}{estimate_text(self.estimate(batch, context, mesh))}"

    def __str__(self):
        return self.text()

    def to_dict(self, batch: int = 1, context: int | None = None, mesh: Mesh = Mesh()) -> dict:
        steps = self.steps(batch, context)
        passes = zip(self.records, steps, steps[1:])
        return {
            "model": self.source.origin.name,
            "recipe": (self.source.recipe or self.recipe).to_dict(),
            "target": self.target.name,
            "batch": steps[-1].batch,
            "context": steps[-1].context,
            "weight_bytes": ir.weight_bytes(self.tree),
            "weight_bytes_per_token": steps[-1].weights / steps[-1].batch,
            "kv_bytes_per_token": steps[-1].kv_token,
            "before": steps[0].to_dict(),
            "after": steps[-1].to_dict(),
            "step_seconds_at_least": steps[-1].seconds(self.target),
            "estimate": self.estimate(batch, context, mesh).to_dict(),
            "healing": heal.plan_dict(self),
            "passes": [
                record_dict(record) | {"step": {"before": old.to_dict(), "after": new.to_dict()}}
                for record, old, new in passes
            ],
        }


def plan(
    model, recipe: Recipe | None = None, target: str | Target = "auto", instruments: Sequence[Instrument] = ()
) -> Plan:
    """Runs every pass on shapes: legality, verification and bytes, before a weight is read.

    Raises: RecipeError, LegalityError, PassError, VerifyError.
    """
    source, recipe = as_source(model), recipe or Recipe(name="none")
    legality.check_stack(recipe)
    planned = on_shapes(source, recipe, target, [legality.Guard(recipe), *instruments])
    legality.check_facts(recipe, *planned.trees)
    return planned


def on_shapes(source: Source, recipe: Recipe, target: str | Target, instruments: Sequence[Instrument] = ()) -> Plan:
    """`plan` without legality's judgement, to show what it would refuse. Raises what `plan` raises but LegalityError."""
    if source.recipe is not None and recipe.steps():
        raise PassError(
            f"{source.origin.name} was compiled with recipe {source.recipe.name!r} already; compile the original model "
            "with one recipe that holds all passes"
        )
    where = target if isinstance(target, Target) else targets.get(target)
    trees, records = pipeline.run(source.tree, recipe, instruments)
    return Plan(source=source, recipe=recipe, target=where, trees=tuple(trees), records=tuple(records))


def compile(
    model,
    recipe: Recipe | None = None,
    target: str | Target = "auto",
    *,
    calibration: str | Path | None = None,
    measured: bool = True,
    dump: str | Path | None = None,
    work: str | Path | None = None,
    progress: bool = False,
) -> "Compiled":
    """Plans, then streams the weights in block by block through the passes, then chooses a kernel for every op.

    Memory peaks at the model plus one dense block. dump, work: folders for the tree after each pass, and for blocks until all are
    done. calibration: a text or a file of one, for calibrated passes and, unless `measured` is False, for the error of each lossy
    pass and `max_kl` (optx.quality): nothing streams then, nor where it heals.
    Raises: what `plan` raises, CheckpointError, LoweringError, QualityError for a broken budget, HealError.
    """
    planned = plan(*resolved(as_source(model), recipe, calibration), target, [Dump(dump)] if dump else [])
    tree = ir.shallow(planned.tree)
    for prefix, block in quality.blocks(planned, calibration, progress, measured, work):
        ir.put(tree, prefix, lower.lower(block, planned.target, planned.recipe.require))
    return Compiled(tree, planned)


class Compiled:
    """A compiled model: runs, reports, exports."""

    def __init__(self, tree: nnx.Module, planned: Plan):
        self.tree, self.plan = tree, planned
        self.tokenizer: Tokenizer | None = planned.source.tokenizer
        self.program = lower.Program.of(tree)
        self._engines: dict[EngineOptions, Engine] = {}

    @functools.cached_property
    def report(self) -> Report:
        source = self.plan.source
        return Report(
            model=source.origin.name,
            recipe=(source.recipe or self.plan.recipe).name,
            target=self.plan.target.name,
            records=self.plan.records,
            weight_bytes=ir.weight_bytes(self.tree),
            cache_bytes=self.program.plan.unit_bytes,
            file_bytes=source.origin.bytes,
            kernels=self.explain(),
        )

    def explain(self) -> str:
        """Per kind of call site: the kernel chosen and why the others declined."""
        return lower.explain(self.tree)

    def logits(self, tokens) -> jax.Array:
        """tokens int32[B, T] -> float32[B, T, V]. Raises RequestError for a wrong shape or token id."""
        try:
            tokens = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            raise RequestError("logits: tokens are rows of different lengths; allowed: int[B, T]") from None
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
            raise RequestError(f"logits: tokens {tokens.dtype}{list(tokens.shape)}; allowed: int[B, T], not empty")
        check_ids(tokens, self.vocab)
        if tokens.shape[1] > self.program.context:
            raise RequestError(f"logits: {tokens.shape[1]} tokens; the context is {self.program.context}")
        lower.check_here(self.tree)
        return self.program.logits(tokens)

    @property
    def vocab(self) -> int:
        return self.program.vocab

    def engine(self, **options) -> Engine:
        """An engine of its own caches; options are the fields of EngineOptions. Raises: RequestError where they do not fit."""
        lower.check_here(self.tree)
        eos = self.tokenizer.eos_ids if self.tokenizer else ()
        chosen = EngineOptions(**options)
        if chosen.speculate is not None and chosen.speculate.draft is not None:
            self._check_draft(chosen.speculate.draft)
        program = self.program
        if chosen.batch_invariant:
            program = lower.Program.of(lower.invariant(self.tree, self.plan.target))
        encode = self.tokenizer and functools.partial(self.tokenizer.encode, add_special=False)
        return Engine(program, chosen, eos, encode)

    def _check_draft(self, draft: "Compiled") -> None:
        """Raises RequestError for a draft model whose token ids mean something else."""
        if self.tokenizer is None or draft.tokenizer is None:
            if draft.vocab != self.vocab:
                raise RequestError(
                    f"speculate.draft: the model has {self.vocab} tokens and the draft model's {draft.vocab}; take one of "
                    "the same vocabulary"
                )
        elif (share := self.tokenizer.agreement(draft.tokenizer)) < ALIKE:
            raise RequestError(
                f"speculate.draft: {share:.1%} of the model's tokens have the same id in the draft model's vocabulary; "
                f"allowed: at least {ALIKE:.0%}; take a draft model of the same family"
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling = Sampling(),
        on_text: OnText | None = None,
        speculate: Speculation | None = None,
    ) -> list[str] | list[list[int]]:
        """Answers to prompts, decoded together: text for text, token ids for token ids. One prompt or a list of them.

        on_text(index, text) is called as text comes; speculate: drafts that make it faster and change nothing else.
        Raises RequestError for a prompt that cannot be served.
        """
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], numbers.Integral)):
            prompts = [prompts]
        answers = self.complete(prompts, sampling, on_text, speculate)
        as_text = [isinstance(prompt, str) for prompt in prompts]
        return [a.text if text else list(a.token_ids) for a, text in zip(answers, as_text, strict=True)]

    def chat(
        self, messages: str | Sequence[Message], sampling: Sampling = Sampling(), on_text: OnText | None = None
    ) -> str:
        """The answer to a conversation, put into the model's chat template; a text is one turn of the user.

        Raises RequestError for a model without a template and for messages that the template refuses.
        """
        return self.complete([encode_chat(messages, self.tokenizer)], sampling, on_text)[0].text

    def complete(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),
        on_text: OnText | None = None,
        speculate: Speculation | None = None,
    ) -> list[Completion]:
        """`generate` with token ids, finish reason and prompt length of every answer."""
        if not len(prompts):
            return []
        ids = [token_ids(encode(prompt, self.tokenizer), self.vocab) for prompt in prompts]
        longest = max(map(len, ids)) + sampling.max_tokens
        context = min(lower.bucket(longest, 128), self.program.context)
        rows = min(lower.bucket(len(ids), 1), 8)
        options = EngineOptions(rows=rows, context=context, speculate=speculate)
        if options not in self._engines:
            self._engines.clear()  # one at a time holds caches, and a new one takes its share of what is free
            self._engines[options] = self.engine(rows=rows, context=context, speculate=speculate)
        return generate(self._engines[options], self.tokenizer, ids, sampling, on_text)

    def evaluate(self, text: str, *, paged: bool = False, **options) -> "evaluate.Evaluation":
        """`optx.evaluate.evaluate`; paged: `optx.evaluate_paged.evaluate_paged`."""
        return (evaluate_paged.evaluate_paged if paged else evaluate.evaluate)(self, text, **options)

    def export(self, folder: str | Path, *, format: str = "optx", overwrite: bool = False) -> Path:
        return export(self, folder, format=format, overwrite=overwrite)


def check_ids(ids: np.ndarray, vocab: int) -> None:
    """Raises RequestError for token ids outside the vocabulary."""
    bad = ids[(ids < 0) | (ids >= vocab)]
    if bad.size:
        raise RequestError(f"token id {int(bad.flat[0])} is outside the vocabulary; allowed: 0 to {vocab - 1}")


CHECKPOINTS = {"hf": write_hf, "compressed-tensors": write_compressed_tensors, "deepseek": write_deepseek}


def export(model: Compiled | Source, folder: str | Path, *, format: str = "optx", overwrite: bool = False) -> Path:
    """Writes a model to a folder that appears whole or not at all.

    format: "optx", a compiled model that `load` gives back with bit-equal logits; "hf", a dense Hugging Face checkpoint, also
    of a loaded model; "compressed-tensors", with weights as they are packed; "deepseek", MLA as a `deepseek_v3` checkpoint.
    Raises CheckpointError when the folder is occupied, and for what the format cannot hold.
    """
    if format not in (known := ("optx", *CHECKPOINTS)):
        raise CheckpointError(f"export format {format!r} is not supported{did_you_mean(format, known)}")
    done = isinstance(model, Compiled)
    source, tree = (model.plan.source, lower.canonical(model.tree)) if done else (model, model.tree)
    if format in CHECKPOINTS:
        if done:
            values = ir.params(tree)
            source = dataclasses.replace(source, tree=ir.abstract(tree), read=lambda path: values[path].get_value())
        return CHECKPOINTS[format](source, Path(folder), by_hf_type, overwrite=overwrite)
    if not done:
        raise CheckpointError(f"{source.origin.name}: compile it before an optx export; format='hf' takes it as it is")
    report = kept(model.plan.records, model.plan.target)
    return exports.write_export(Path(folder), tree, source, model.plan.recipe, overwrite=overwrite, report=report)
