"""`optx serve`: its flags, and from them an engine, a socket and limits."""

import logging
import os
import sys
from pathlib import Path

import jax

import optx
from optx.cli_flags import Flag, Verb
from optx.cli_verbs import speculation
from optx.compaction import LEAST, Compaction, Compactor
from optx.engine.memory import claim
from optx.engine.options import default_chunks
from optx.errors import ServeError, UsageError
from optx.recipe import Recipe

KEY = "OPTX_API_KEY"
ROWS_CPU, ROWS = 8, 256
WAITING = 1024
# Ways of sampling that have programs of their own.
WAYS = (optx.Sampling(), optx.Sampling(temperature=1.0), optx.Sampling(temperature=1.0, logprobs=0))
WEB = {"prometheus_client", "starlette", "uvicorn"}


def serve(
    model: str, *, weights, dtype, recipe, host, port, rows, context, budget, memory, max_waiting, prefix_cache, graphs,
    speculate, compact_at, keep_turns, api_key, served_model_name, max_body_mb, timeout, step_limit, cors,
) -> None:  # fmt: skip
    try:
        from optx.serve import server
    except ModuleNotFoundError as error:
        if error.name not in WEB:
            raise
        raise ServeError(f"optx serve needs {error.name}: pip install 'optx[serve]'") from None
    if port > 65535:
        raise UsageError(f"serve: --port={port}: allowed: 0 to 65535")
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.WARNING)
    listener = server.bind(host, port)  # before the work, not after
    claim()
    source = optx.load(model, weights, dtype)
    compactor = _compactor(source, compact_at, keep_turns, context)
    progress = sys.stderr.isatty()
    compiled = optx.compile(source, None if recipe is None else Recipe.from_yaml(recipe), progress=progress)
    engine = compiled.engine(
        rows=rows or (ROWS if jax.default_backend() != "cpu" else ROWS_CPU),
        context=context,
        chunks=None if budget is None else (*(size for size in default_chunks() if size < budget), budget),
        memory=memory,
        max_waiting=max_waiting,
        prefix_cache=prefix_cache,
        graphs=graphs,
        speculate=speculation(speculate),
    )
    engine.warm_up(*WAYS, progress=progress)
    limits = server.Limits(
        api_key=api_key or os.environ.get(KEY) or None,
        body=max_body_mb << 20,
        seconds=timeout,
        step=step_limit,
        cors=cors,
    )
    server.serve(
        engine,
        model=served_model_name or Path(model).name,
        version=optx.__version__,
        tokenizer=compiled.tokenizer,
        vocab=compiled.vocab,
        limits=limits,
        listener=listener,
        say=lambda line: print(line, flush=True),
        compactor=compactor,
    )


def _compactor(source, at: int | None, keep_turns: int | None, context: int | None) -> Compactor | None:
    """Raises RequestError for a model that cannot be asked for a summary, before it is compiled."""
    if at is None and keep_turns is not None:
        raise UsageError(f"serve: --keep_turns={keep_turns} goes with --compact_at")
    if at is None:
        return None
    how = Compaction(at=at, **({} if keep_turns is None else {"keep_turns": keep_turns}))
    return Compactor(how, source.tokenizer, min(context or source.tree.context, source.tree.context))


def verb(model_flags: tuple[Flag, ...], recipe: Flag) -> Verb:
    return Verb(
        name="serve",
        line="answer OpenAI-compatible requests over HTTP, many at once",
        arguments=("MODEL",),
        flags=(
            recipe,
            Flag(name="host", value="HOST", default="127.0.0.1", help="where to listen; 0.0.0.0: on every address"),
            Flag(name="port", kind=int, least=0, default=8000, value="N", help="0: any that is free"),
            Flag(name="rows", kind=int, least=1, value="N", help=f"requests decoded at once ({ROWS}, on a CPU {ROWS_CPU})"),
            Flag(
                name="context",
                kind=int,
                least=2,
                value="N",
                help="longest prompt and answer, tokens (default: the model's context)",
            ),
            Flag(
                name="budget",
                kind=int,
                least=1,
                value="N",
                help="tokens of a step, those of prompts and of answers together (default: 2048, on a CPU 512)",
            ),
            Flag(
                name="memory",
                kind=float,
                value="M",
                help="for caches: bytes, or up to 1 a fraction of the device memory that is free",
            ),
            Flag(
                name="max_waiting",
                kind=int,
                least=1,
                default=WAITING,
                value="N",
                help="requests that may wait; more are answered with 429",
            ),
            Flag(name="prefix_cache", kind=bool, default=True, help="keep the caches of prompts that others may share"),
            Flag(
                name="graphs",
                kind=bool,
                default=True,
                help="on NVIDIA GPUs steps run as CUDA graphs; false: kernel by kernel, which is faster on Hopper where they are "
                "few and large",
            ),
            Flag(name="speculate", value="HOW", help="draft with: ngram (the text itself), mtp, or a smaller MODEL's path"),
            Flag(
                name="compact_at",
                kind=int,
                least=LEAST,
                value="TOKENS",
                help="summarise the old turns of chats whose prompt is longer; answers tell of it (default: never)",
            ),
            Flag(name="keep_turns", kind=int, least=1, value="N", help="--compact_at: newest turns that stay word for word (2)"),
            Flag(name="api_key", value="KEY", help=f"what requests must carry (default: the environment's {KEY}, if any)"),
            Flag(name="served_model_name", value="NAME", help="the name that requests give (default: MODEL's file name)"),
            Flag(name="max_body_mb", kind=int, least=1, default=32, value="N", help="largest body of a request, MiB"),
            Flag(name="timeout", kind=float, least=0.1, value="S", help="seconds a request may take (default: any)"),
            Flag(
                name="step_limit",
                kind=float,
                least=0,
                default=60.0,
                value="S",
                help="seconds after which a step counts as hung and /health fails",
            ),
            Flag(name="cors", value="ORIGIN", repeated=True, help="a web origin whose pages may call the server; *: all"),
            *model_flags,
        ),
        examples=(
            "optx serve compiled --port 8000",
            "optx serve model.gguf --weights packed --recipe packed_kv8 --rows 16 --context 4096 --api_key secret",
        ),
        notes="Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics, /openapi.json, and a page "
        "at /. Prints a line with the URL when every program is compiled and requests are taken. SIGTERM and Ctrl-C finish "
        "what is under way; a second one ends at once.",
        run=serve,
    )  # fmt: skip
