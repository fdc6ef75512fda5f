"""Load on a server or on the bare engine: latencies, throughput, goodput.

    optx bench serve --url http://127.0.0.1:8000 [--num_prompts 512] [--input_len 512] [--output_len 128] [--concurrency 256]
    optx bench serve --in_process qwen3-8b [--recipe R] [--engine rows=256] ...          no server, no web packages
    python -m optx.bench.serve ... [--json FILE] [--against FILE]

The server may be any that speaks OpenAI's completions or chat with streaming. With equal load and seed both forms send the same
token ids, so the cost of a server is 1 - its output tokens/s by those of the bare engine: `--against FILE` prints it.

The JSON holds the keys of `optx.bench.figures.summarize`, `form` and `model`; in process also `engine`, the fields of
`optx.bench.bare.EngineFigures`; over HTTP `server` {url, endpoint, prompts, counted}.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from optx.bench import bare, figures
from optx.bench.bare import Bare
from optx.bench.load import Load, Server, flag_of, settings
from optx.compilation_cache import enable_compilation_cache
from optx.engine.memory import claim
from optx.errors import OptxError, UsageError

SETTINGS = (Server, Bare, Load)
EXTRA = {
    "slo": "limits in ms, as in 'ttft:1000 tpot:50'; adds goodput",
    "against": "figures of an earlier run (its JSON) to compare with",
}


def flags(but: Sequence[str] = ()) -> list[tuple[str, type, bool, str]]:
    """(name, type, whether it may be repeated, help) of every flag, without those named in `but`."""
    found = [flag_of(field) for cls in SETTINGS for field in dataclasses.fields(cls)]
    return [
        flag for flag in [*found, *((name, str, False, help) for name, help in EXTRA.items())] if flag[0] not in but
    ]


FLAGS = tuple(name for name, *_ in flags())


def run(given: Mapping, *, progress: bool = False, say: Callable[[str], None] = lambda text: None) -> dict:
    """Runs the form that the flags name. flags: the fields of Load, Bare and Server that are set (None: not), and `slo`.

    Raises: UsageError for wrong flags, RequestError when nothing could be measured.
    """
    load, slo = settings(Load, given), figures.parse_slo(given.get("slo") or "")
    engine, server = settings(Bare, given), settings(Server, given)
    if (engine.in_process is None) == (server.url is None):
        raise UsageError("bench serve: give one of --url (a server) and --in_process (a model or the name of a config)")
    mine, others = (Server, Bare) if engine.in_process is None else (Bare, Server)
    for field in dataclasses.fields(others):
        if given.get(field.name):
            raise UsageError(f"bench serve: --{field.name} says nothing with --{dataclasses.fields(mine)[0].name}")
    if engine.in_process is not None:
        claim()
        return bare.run(engine, load, slo, progress=progress, say=say)
    try:
        from optx.bench import client
    except ModuleNotFoundError as error:
        raise UsageError(f"bench serve --url needs {error.name}; pip install 'optx[serve]'") from None
    return client.run(server, load, slo, progress=progress)


def text(found: Mapping, against: Mapping | None = None) -> str:
    """Tables of the load and, in process, of the engine. against: earlier figures to set beside these."""
    parts = [figures.text(found)]
    if "engine" in found:
        parts += ["", bare.text(found)]
    if against is not None:
        parts += ["", figures.comparison(found, against)]
    return "\n".join(parts)


def read(path: str | Path) -> dict:
    """Figures that an earlier run wrote. Raises UsageError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--against {path}: {error}") from None
    if not isinstance(found, dict) or "output_tokens_per_second" not in found:
        raise UsageError(f"--against {path}: no figures of bench serve; allowed: what its --out or --json wrote")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind, repeated, help in flags():
        how = {"action": "store_true"} if kind is bool else {"type": kind, "action": "append" if repeated else "store"}
        parser.add_argument(f"--{name}", default=None, help=help, **how)
    parser.add_argument("--json", type=Path, help="write every figure there")
    args = vars(parser.parse_args())
    out = args.pop("json")
    enable_compilation_cache()
    try:
        against = read(args["against"]) if args["against"] else None
        found = run(args, progress=sys.stderr.isatty(), say=functools.partial(print, flush=True))
    except OptxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    print(text(found, against))
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
