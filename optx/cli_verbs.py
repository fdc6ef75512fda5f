"""What each verb of the command line does. Results on stdout, progress and notes on stderr."""

import json as json_text
import sys
import time
from pathlib import Path

import optx
from optx import cli_bisect, ir
from optx import target as targets
from optx.bench import against, ceilings, kernels, serve, step, timing
from optx.checkpoint.export import check_free
from optx.checkpoint.export_ct import encoded_again
from optx.checkpoint.source import Source
from optx.errors import RequestError, UsageError, did_you_mean, no_such_path
from optx.generate import encode_chat
from optx.recipe import Recipe
from optx.report import quality_text


def describe(model: str, *, weights, dtype, json) -> None:
    source = optx.load(model, weights, dtype)
    if json:
        _print_json(_facts(source) | {"modules": [_module(entry) for entry in ir.entries(source.tree)]})
        return
    for name, value in _facts(source).items():
        if value is not None and name not in ("parameters", "weight_bytes", "kv_bytes_per_token"):
            text = ir.size_text(value) if name == "file_bytes" else f"{value:,}" if isinstance(value, int) else value
            print(f"{name.removesuffix('_bytes'):<11} {text}")
    print(f"\n{source}", end="")


def _facts(source: Source) -> dict:
    tokenizer, origin = source.tokenizer, source.origin
    return {
        "model": origin.name,
        "family": origin.config.get("model_type"),
        "form": _form(source),
        "dtype": origin.dtype,
        "file_bytes": origin.bytes or None,
        "context": source.tree.context,
        "vocabulary": tokenizer.vocab_size if tokenizer else None,
        "chat": ("yes" if tokenizer.chat_template else "no template") if tokenizer else None,
        "recipe": source.recipe.name if source.recipe else None,
        "parameters": ir.weight_count(source.tree),
        "weight_bytes": ir.weight_bytes(source.tree),
        "kv_bytes_per_token": source.tree.cache_plan().unit_bytes,
    }


def _form(source: Source) -> str:
    if source.recipe is not None:
        return "optx export"
    if source.origin.kind == "gguf":
        return "GGUF file"
    return "Hugging Face directory" if source.origin.bytes else "config, without weights"


def _module(entry: ir.Entry) -> dict:
    return {"path": entry.path, "text": entry.text, "bytes": entry.bytes}


def compile(
    model: str, *, weights, dtype, recipe, target, out, calibration, unmeasured, bisect, dump, overwrite, json
) -> None:
    chosen = _recipe(recipe)
    text = _calibration(chosen, calibration)
    if bisect:
        unwanted = {"out": out, "dump": dump, "overwrite": overwrite}
        source = optx.load(model, weights, dtype)
        cli_bisect.run(source, chosen, target, text, unwanted, json=json, progress=_terminal())
        return
    if out is None:
        raise UsageError("compile: --out DIR is missing; only --bisect writes nothing")
    check_free(Path(out), overwrite)  # before the work, not after
    source = optx.load(model, weights, dtype)
    compiled = optx.compile(
        source,
        chosen,
        target,
        calibration=text,
        measured=not unmeasured,
        dump=dump,
        work=f"{out}.work" if unmeasured else None,
        progress=_terminal(),
    )
    compiled.export(out, overwrite=overwrite)
    if json:
        _print_json(compiled.report.to_dict() | {"out": out})
    else:
        print(f"{compiled.report}\n\nwritten to {out}; try: optx generate {out} --prompt 'Hello'")


def generate(
    model: str,
    *,
    weights,
    dtype,
    recipe,
    prompt,
    chat,
    max_tokens,
    temperature,
    top_k,
    top_p,
    seed,
    stop,
    speculate,
    json,
) -> None:
    sampling = optx.Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
    )
    source = optx.load(model, weights, dtype)
    ids = encode_chat(prompt, source.tokenizer) if chat else prompt
    compiled = optx.compile(source, _recipe(recipe), progress=_terminal())
    began, first = time.perf_counter(), []

    def show(index: int, text: str) -> None:
        first or first.append(time.perf_counter() - began)
        if not json:
            print(text, end="", flush=True)

    answer = compiled.complete([ids], sampling, show, speculation(speculate))[0]
    seconds = time.perf_counter() - began
    if json:
        facts = {"prompt_tokens": answer.prompt_tokens, "finish": answer.finish, "seconds": seconds}
        _print_json({"text": answer.text, "token_ids": answer.token_ids, **facts})
        return
    print(flush=True)
    after = f", the first after {first[0]:.1f} s" if first else ""
    count = f"{answer.prompt_tokens} prompt tokens, {len(answer.token_ids)} new in {seconds:.1f} s"
    say(f"[{count}{after}; {answer.finish}]")


def speculation(how: str | None) -> optx.Speculation | None:
    """From a flag: None, a method without a model of its own, or the path of a draft model."""
    if how is None or how in ("ngram", "mtp"):
        return how and optx.Speculation(method=how)
    return optx.Speculation(method="draft", draft=optx.compile(optx.load(how), progress=_terminal()))


def export(model: str, *, weights, dtype, format, out, overwrite) -> None:
    if format == "gguf":
        raise UsageError(f"export --format {format}: not supported yet; supported: hf, compressed-tensors, deepseek")
    check_free(Path(out), overwrite)
    source = optx.load(model, weights, dtype)
    optx.export(source, out, format=format, overwrite=overwrite)
    size = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
    kind = f"dense {source.origin.dtype}" if format == "hf" else format
    print(f"{source.origin.name}: {kind} safetensors, {ir.size_text(size)}, written to {out}")
    if format == "compressed-tensors" and (changed := encoded_again(Path(out))):
        worst = f"rms of the change up to {max(changed.values()):.2%} of the weights'"
        print(f"{len(changed)} nvfp4 weights encoded again under one outer scale a tensor: {worst}")


def evaluate(
    model: str, *, weights, dtype, recipe, calibration, text, context, stride, max_windows, against, paged, prompt, json
) -> None:
    if prompt is not None and not paged:
        raise UsageError(f"--prompt {prompt}: one forward has no prompt; add --paged")
    chosen = _recipe(recipe)
    sample, words = _calibration(chosen, calibration), read_text(text)
    other = optx.compile(optx.load(against), progress=_terminal()) if against else None
    compiled = optx.compile(optx.load(model, weights, dtype), chosen, calibration=sample, progress=_terminal())
    options = {"context": context, "stride": stride, "max_windows": max_windows, "against": other}
    options |= {"paged": True, "prompt": prompt} if paged else {}
    result = compiled.evaluate(words, **options, progress=_terminal())
    if json:
        against_name = {"against": other.plan.source.origin.name} if other else {}
        passes = {"passes": compiled.report.to_dict()["records"]} if sample else {}
        _print_json({"model": compiled.plan.name, **against_name, "context": context, **result.to_dict(), **passes})
        return
    rows = [
        ("model", compiled.plan.name),
        ("perplexity", f"{result.perplexity:.4f}"),
        ("bits a byte", f"{result.bits_per_byte:.4f}"),
        ("windows", f"{result.windows} of up to {context:,} tokens, {result.tokens:,} tokens scored"),
    ]
    if other:
        name = other.plan.source.origin.name
        rows += [("KL", f"{result.kl:.6f} nats a token against {name}")]
        rows += [("top-1", f"{100 * result.top1:.2f} % of tokens agree with {name}")]
    if paged:
        held = ", ".join(map(str, result.pages))
        rows += [
            ("pages", f"{held} of {result.page_size} tokens held at most, of {result.whole_pages} without eviction")
        ]
        rows += [("curve", ", ".join(f"{value:.4g} to {tokens:,}" for tokens, value in result.curve))]
    print("\n".join(f"{label:<12} {value}" for label, value in rows))
    if sample:
        print(f"\n{quality_text(compiled.plan.records)}")


def _bench_decode(flags) -> tuple[dict, str]:
    if flags["against-plan"]:
        return against.bench(flags, say)
    for name in ("target", "measured", "store"):
        if flags[name]:
            raise UsageError(f"bench decode: --{name} goes with --against-plan")
    found = step.run(
        flags["shape"] or step.SHAPES, batches=flags["batch"] or step.BATCHES,
        context=flags["context"] or step.CONTEXT, recipes=[_recipe(flags["recipe"])], require=flags["require"], say=say,
    )  # fmt: skip
    return step.to_dict(found), step.text(found)


def _bench_kernels(flags) -> tuple[dict, str]:
    lines, ceilings = kernels.run(flags["op"], alone=flags["alone"])
    shown = kernels.text(lines, ceilings) if lines else kernels.ceilings_text(ceilings)
    return kernels.to_dict(lines, ceilings), shown


def _bench_serve(flags) -> tuple[dict, str]:
    against = serve.read(flags["against"]) if flags["against"] else None
    found = serve.run(flags, progress=_terminal(), say=say)
    return found, serve.text(found, against)


def _bench_ceilings(flags) -> tuple[dict, str]:
    if flags["store"]:
        targets.check_name(flags["store"])  # before the work, not after
    found = timing.ceilings()
    data, shown = kernels.to_dict([], found), kernels.ceilings_text(found)
    if flags["store"]:
        path = str(ceilings.store(found, flags["store"]))
        data |= {"stored": path}
        shown += f"\nstored in {path}; try: optx plan MODEL --target {flags['store']}"
    return data, shown


# Flags that say something to each, and what runs it -> (JSON, text).
BENCHES = {
    "kernels": (("op", "alone"), _bench_kernels),
    "decode": (
        ("shape", "batch", "context", "recipe", "require", "against-plan", "target", "measured", "store"),
        _bench_decode,
    ),
    "serve": (serve.FLAGS, _bench_serve),
    "ceilings": (("store",), _bench_ceilings),
}


def bench(what: str, *, out, json, **flags) -> None:
    if what not in BENCHES:
        raise UsageError(f"bench: {what!r}{did_you_mean(what, [*BENCHES, 'retrieval'])}")
    allowed, measure = BENCHES[what]
    wrong = [name for name, value in flags.items() if value and name not in allowed]
    if wrong:
        raise UsageError(f"bench {what}: --{wrong[0]} says nothing here; allowed: {', '.join(allowed) or 'none'}")
    data, shown = measure(flags)
    if out:
        Path(out).write_text(json_text.dumps(data, indent=1) + "\n")
    if json:
        _print_json(data)
    else:
        print(shown)


def _recipe(path: str | None) -> Recipe | None:
    return None if path is None else Recipe.from_yaml(path)


def _calibration(recipe: Recipe | None, path: str | None) -> Path | None:
    """The flag's file. Raises UsageError where nothing would be measured on it."""
    if path is not None and (recipe is None or all(pass_.exact for pass_, _ in recipe.steps())):
        names = ", ".join(pass_.name for pass_, _ in recipe.steps()) if recipe else "no recipe"
        raise UsageError(f"--calibration {path}: no pass here is lossy ({names or 'no pass'}); leave the flag out")
    return path and Path(path)


def read_text(path: str, where: str = "--text") -> str:
    """A file of UTF-8 text. Raises RequestError; where: the flag or key that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"{where} {no_such_path(path)}") from None
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at {error.start:,}"
        raise RequestError(f"{where} {path}: not UTF-8: {got}; convert it with iconv -f ENCODING -t UTF-8") from None
    except OSError as error:
        raise RequestError(f"{where} {path}: cannot be read: {error.strerror or error}") from None


def _print_json(value: dict) -> None:
    print(json_text.dumps(value, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _terminal() -> bool:
    return sys.stderr.isatty()
