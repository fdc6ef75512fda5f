"""load, plan, compile: the public interface."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from optx import evaluate, ir, legality, lower, pipeline, target as targets
from optx.checkpoint import export as exports
from optx.checkpoint.source import Source, from_module, open_gguf, open_hf
from optx.engine.engine import Engine, EngineOptions
from optx.engine.request import Completion, Sampling
from optx.errors import CheckpointError, PassError, RequestError
from optx.generate import OnText, Prompt, encode, generate
from optx.models import by_gguf_architecture, by_hf_type
from optx.pipeline import Dump, Instrument, Record
from optx.recipe import Recipe
from optx.report import HEADER, Report, pass_rows, record_dict, table
from optx.target import Target
from optx.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")


def load(model: str | Path, weights: str = "dense", dtype: str | None = None) -> Source:
    """A model by path or hub id, without reading its weights.

    model: an HF directory, a GGUF file, an optx export, or a hub id (downloaded when online).
    weights: "dense", or "packed" to keep a GGUF's block formats as they are in memory.
    dtype: of dense weights and activations; None: the checkpoint's own, float32 for GGUF.
    Raises: CheckpointError, ConfigError.
    """
    if weights not in ("dense", "packed"):
        raise CheckpointError(f"weights={weights!r}; allowed: 'dense', 'packed'")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    path = Path(model)
    try:
        if not path.exists():
            path = _from_hub(str(model))
        if path.is_file():
            return open_gguf(path, by_gguf_architecture, dtype=dtype or "float32", packed=weights == "packed")
        if exports.is_export(path):
            return exports.open_export(path, by_hf_type)
        if weights == "packed":
            raise CheckpointError(f"{path}: weights='packed' is for GGUF files; an HF directory holds dense weights")
        return open_hf(path, by_hf_type, dtype=dtype)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _from_hub(name: str) -> Path:
    """Downloads a hub id's safetensors, config and tokenizer. Raises CheckpointError when it cannot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".gguf", ".yaml", ".json")):
        raise CheckpointError(f"{name}: no such file or directory")
    patterns = ["*.safetensors", "*.json", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: no such path, and the hub gave no model of this name: {first}") from None


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

    def bytes_per_token(self, batch: int = 1, context: int = 1) -> dict[str, float]:
        """Bytes that one decode step moves: weights read (the input embedding is not, unless tied) and KV read."""
        return {"weights": read_bytes(self.tree), "kv": self.tree.cache_plan().bytes(batch, context)}

    def __str__(self):
        title = f"{self.source.origin.name} + {self.recipe.name} for {self.target}"
        return f"{title}\n{ir.summary(self.tree)}\n\n{table(HEADER, pass_rows(self.records))}"

    def to_dict(self) -> dict:
        return {
            "model": self.source.origin.name,
            "recipe": self.recipe.to_dict(),
            "target": self.target.name,
            "weight_bytes": ir.weight_bytes(self.tree),
            "weight_bytes_per_token": read_bytes(self.tree),
            "kv_bytes_per_token": self.tree.cache_plan().bytes(1, 1),
            "passes": [record_dict(record) for record in self.records],
        }


def read_bytes(tree: nnx.Module) -> int:
    """Weight bytes that one decode step reads: all but rows of an untied input embedding."""
    total = ir.weight_bytes(tree)
    return total if tree.output is None else total - ir.weight_bytes(tree.embed)


def plan(
    model, recipe: Recipe | None = None, target: str | Target = "auto", instruments: Sequence[Instrument] = ()
) -> Plan:
    """Runs every pass on shapes: legality, verification and bytes, before a weight is read.

    Raises: RecipeError, LegalityError, PassError, VerifyError.
    """
    source, recipe = as_source(model), recipe or Recipe(name="none")
    if source.recipe is not None and recipe.steps():
        raise PassError(
            f"{source.origin.name} was compiled with recipe {source.recipe.name!r} already; compile the original model "
            "with one recipe that holds all passes"
        )
    where = target if isinstance(target, Target) else targets.get(target)
    legality.check_stack(recipe)
    trees, records = pipeline.run(source.tree, recipe, instruments)
    legality.check_facts(recipe, trees[-1])
    return Plan(source=source, recipe=recipe, target=where, trees=tuple(trees), records=tuple(records))


def compile(
    model,
    recipe: Recipe | None = None,
    target: str | Target = "auto",
    *,
    dump: str | Path | None = None,
    progress: bool = False,
) -> "Compiled":
    """Plans, then streams the weights in block by block through the passes, then chooses a kernel for every op.

    Memory peaks at the compressed model plus one dense block. dump: a folder for the tree after each pass.
    Raises: what `plan` raises, CheckpointError for bad weights, LoweringError.
    """
    planned = plan(model, recipe, target, [Dump(dump)] if dump else [])
    source = planned.source
    tree = ir.shallow(planned.tree)
    for prefix in tqdm(source.segments(), desc="compile", unit="block", disable=not progress):
        block = pipeline.apply_block(source.block(prefix), prefix, planned.recipe, planned.trees, planned.records)
        ir.put(tree, prefix, block)
    tree = lower.lower(tree, planned.target, planned.recipe.require)
    return Compiled(tree, planned)


class Compiled:
    """A compiled model: runs, reports, exports."""

    def __init__(self, tree: nnx.Module, planned: Plan):
        self.tree = tree
        self.plan = planned
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
            cache_bytes=self.program.plan.bytes(1, 1),
            file_bytes=source.origin.bytes,
            kernels=self.explain(),
        )

    def explain(self) -> str:
        """Per kind of call site: the kernel chosen and why the others declined."""
        return lower.explain(self.tree)

    def logits(self, tokens) -> jax.Array:
        """tokens int32[B, T] -> float32[B, T, V]. Raises RequestError for a wrong shape or token id."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or 0 in tokens.shape:
            raise RequestError(f"logits: tokens {tokens.dtype}{list(tokens.shape)}; allowed: int[B, T], not empty")
        check_ids(tokens, self.vocab)
        if tokens.shape[1] > self.program.context:
            raise RequestError(f"logits: {tokens.shape[1]} tokens; the context is {self.program.context}")
        return self.program.logits(tokens)

    @property
    def vocab(self) -> int:
        return self.tree.embed.table.get_value().shape[0]

    def engine(self, **options) -> Engine:
        """An engine of its own caches; options are the fields of EngineOptions."""
        eos = self.tokenizer.eos_ids if self.tokenizer else ()
        return Engine(self.program, EngineOptions(**options), eos_ids=eos)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling = Sampling(), on_text: OnText | None = None
    ) -> list[str] | list[list[int]]:
        """Answers to prompts, decoded together: text for text, token ids for token ids. One prompt or a list of them.

        on_text(index, text) is called as text comes. Raises RequestError for a prompt that cannot be served.
        """
        prompts = [prompts] if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)) else prompts
        answers = self.complete(prompts, sampling, on_text)
        as_text = [isinstance(prompt, str) for prompt in prompts]
        return [a.text if text else list(a.token_ids) for a, text in zip(answers, as_text, strict=True)]

    def complete(
        self, prompts: Sequence[Prompt], sampling: Sampling = Sampling(), on_text: OnText | None = None
    ) -> list[Completion]:
        """`generate` with token ids, finish reason and prompt length of every answer."""
        if not len(prompts):
            return []
        ids = [encode(prompt, self.tokenizer) for prompt in prompts]
        for prompt in ids:
            check_ids(np.asarray(prompt, np.int64), self.vocab)
        longest = max(map(len, ids)) + sampling.max_tokens
        context = min(lower.bucket(longest, 128), self.program.context)
        rows = min(lower.bucket(len(ids), 1), 8)
        options = EngineOptions(rows=rows, context=context)
        if options not in self._engines:
            self._engines = {options: self.engine(rows=rows, context=context)}  # one at a time holds caches
        return generate(self._engines[options], self.tokenizer, ids, sampling, on_text)

    def evaluate(self, text: str, **options) -> "evaluate.Evaluation":
        """Perplexity on a text; see `optx.evaluate.evaluate`."""
        return evaluate.evaluate(self, text, **options)

    def export(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        return export(self, folder, overwrite=overwrite)


def check_ids(ids: np.ndarray, vocab: int) -> None:
    """Raises RequestError for token ids outside the vocabulary."""
    bad = ids[(ids < 0) | (ids >= vocab)]
    if bad.size:
        raise RequestError(f"token id {int(bad.flat[0])} is outside the vocabulary; allowed: 0 to {vocab - 1}")


def export(compiled: Compiled, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a compiled model that `load` gives back with bit-equal logits: orbax checkpoint, manifest, tokenizer.

    Atomic: the folder appears whole or not at all. Raises CheckpointError when it exists and is not empty.
    """
    return exports.write_export(
        Path(folder), compiled.tree, compiled.plan.source, compiled.plan.recipe, overwrite=overwrite
    )


LoadFunction = Callable[[str], Source]
