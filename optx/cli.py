"""The command line: `optx VERB ...`.

Exit codes: 0 done, 1 an error of the model, recipe or request, 2 a wrong command line, 130 interrupted.
"""

import gc
import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging

import optx
from optx import (
    cli_ablate,
    cli_bisect,
    cli_heal,
    cli_plan,
    cli_ranks,
    cli_report,
    cli_retrieval,
    cli_rotate,
    cli_search,
    cli_serve,
    cli_verbs,
)
from optx.api import DTYPES, WEIGHTS
from optx.bench import against, serve
from optx.bench.step import SHAPES
from optx.cli_flags import Flag, Verb, find, overview, parse
from optx.cli_verbs import say
from optx.compilation_cache import enable_compilation_cache
from optx.errors import OptxError, UsageError
from optx.target import TARGETS

MODEL_FLAGS = (
    Flag(
        name="weights",
        allowed=WEIGHTS,
        default="dense",
        help="packed: weights stay in the blocks of the file, GGUF or MXFP4",
    ),
    Flag(name="dtype", allowed=DTYPES, help="of dense weights and activations (default: the checkpoint's own)"),
)
RECIPE = Flag(name="recipe", value="R", help="YAML file, or the name of a recipe that ships with optx")
TARGET = Flag(
    name="target",
    value="NAME",
    default="auto",
    help=f"auto (this machine), a YAML file, a target of yours, or one of {', '.join(TARGETS)}",
)
CALIBRATION = Flag(name="calibration", value="FILE", help="text on which the cost of each lossy pass is measured")
OVERWRITE = Flag(name="overwrite", kind=bool, default=False, help="replace what stands at --out")
JSON = Flag(name="json", kind=bool, default=False, help="print JSON")
# A number has no default here: those of serve stand with its settings, and other benches must not see them.
SERVE_FLAGS = tuple(
    Flag(name=name, kind=kind, repeated=repeated, value=name.upper(), help=f"serve: {help}")
    for name, kind, repeated, help in serve.flags(but=("recipe", "require"))
)

VERBS = (
    Verb(
        name="describe",
        line="print the module tree of a model: parts, shapes, formats, bytes",
        arguments=("MODEL",),
        flags=(*MODEL_FLAGS, JSON),
        examples=("optx describe model.gguf --weights packed", "optx describe config.json", "optx describe qwen3-8b"),
        notes="Reads headers only, no weights. A bare config.json will do, or the name of one that ships with optx.",
        run=cli_verbs.describe,
    ),
    cli_plan.verb(MODEL_FLAGS, RECIPE, TARGET, JSON),
    Verb(
        name="compile",
        line="apply a recipe to a model's weights and write the result",
        arguments=("MODEL",),
        flags=(
            Flag(**{**vars(RECIPE), "required": True}),
            Flag(name="out", value="DIR", help="folder of the export; appears whole or not at all (not with --bisect)"),
            TARGET,
            CALIBRATION,
            Flag(
                name="unmeasured",
                kind=bool,
                default=False,
                help="calibrated passes see the text and nothing is measured on it: weights stream, and a compile that was "
                "killed goes on from OUT.work",
            ),
            cli_bisect.FLAG,
            Flag(name="dump", value="DIR", help="write the tree after each pass there, as text"),
            OVERWRITE,
            *MODEL_FLAGS,
            JSON,
        ),
        examples=(
            "optx compile model.gguf --recipe int4_kv8 --out compiled",
            "optx compile model.gguf --recipe int4_kv8 --calibration text.txt --bisect",
        ),
        run=cli_verbs.compile,
    ),
    Verb(
        name="generate",
        line="continue a prompt, or answer it with --chat; text appears as it is decoded",
        arguments=("MODEL",),
        flags=(
            Flag(name="prompt", value="TEXT", required=True, help="what to continue or to answer"),
            Flag(name="chat", kind=bool, default=False, help="put the prompt into the model's chat template"),
            Flag(name="max_tokens", kind=int, default=64, value="N", help="longest answer"),
            Flag(name="temperature", kind=float, default=0.0, value="T", help="0 takes the likeliest token"),
            Flag(name="top_k", kind=int, default=0, value="K", help="draw from the K likeliest tokens; 0: all"),
            Flag(
                name="top_p",
                kind=float,
                default=1.0,
                value="P",
                help="draw from the likeliest tokens that hold P of the mass",
            ),
            Flag(name="seed", kind=int, default=0, value="N", help="of the draws: the same seed gives the same text"),
            Flag(name="stop", value="TEXT", repeated=True, help="end before this text"),
            Flag(
                name="speculate",
                value="HOW",
                help="draft with: ngram (the text itself), mtp, or a smaller MODEL's path",
            ),
            RECIPE,
            *MODEL_FLAGS,
            JSON,
        ),
        examples=(
            "optx generate compiled --prompt 'The capital of France is' --max_tokens 20",
            "optx generate model.gguf --chat --prompt 'Name three rivers.' --temperature 0.7 --top_p 0.9",
        ),
        run=cli_verbs.generate,
    ),
    Verb(
        name="eval",
        line="perplexity on a text; against another model, KL divergence and agreement",
        arguments=("MODEL",),
        flags=(
            Flag(name="text", value="FILE", required=True, help="UTF-8 text"),
            Flag(name="context", kind=int, default=1024, least=2, value="N", help="tokens of a window"),
            Flag(
                name="stride",
                kind=int,
                least=1,
                value="N",
                help="tokens between windows (default: they do not overlap)",
            ),
            Flag(name="max_windows", kind=int, least=1, value="N", help="stop after as many (default: the whole text)"),
            Flag(name="against", value="MODEL", help="reference, loaded dense in its own dtype"),
            Flag(
                name="paged", kind=bool, default=False, help="over the paged caches, rows compacted as the engine does"
            ),
            Flag(
                name="prompt", kind=int, least=1, value="N", help="with --paged: first tokens of a window, not scored"
            ),
            RECIPE,
            CALIBRATION,
            *MODEL_FLAGS,
            JSON,
        ),
        examples=(
            "optx eval compiled --text test.txt --context 1024 --max_windows 20 --against model.gguf",
            "optx eval model --recipe optx/configs/stream.yaml --text book.txt --context 100000 --paged",
        ),
        run=cli_verbs.evaluate,
    ),
    Verb(
        name="export",
        line="write a model or a compiled model as a checkpoint that other programs read",
        arguments=("DIR",),
        flags=(
            Flag(
                name="format",
                allowed=("hf", "compressed-tensors", "deepseek", "gguf"),
                required=True,
                help="hf: dense safetensors for transformers; compressed-tensors: weights as they are packed, for vLLM and "
                "SGLang; deepseek: what the pass mla converted with one rotated key, as deepseek_v3. The other is not supported "
                "yet",
            ),
            Flag(name="out", value="DIR", required=True, help="folder of the checkpoint; appears whole or not at all"),
            OVERWRITE,
            *MODEL_FLAGS,
        ),
        examples=("optx export compiled --format hf --out hf",),
        notes="DIR is an optx export or anything else that MODEL may be. For hf, packed weights are dequantized.",
        run=cli_verbs.export,
    ),
    cli_ablate.verb(MODEL_FLAGS, CALIBRATION, JSON),
    cli_ranks.verb(RECIPE, CALIBRATION, OVERWRITE, MODEL_FLAGS[1], JSON),
    cli_report.verb(MODEL_FLAGS, RECIPE, TARGET, OVERWRITE, JSON),
    cli_rotate.verb(RECIPE, CALIBRATION, MODEL_FLAGS[1], JSON),
    cli_search.verb(TARGET, CALIBRATION, MODEL_FLAGS[1], JSON),
    cli_serve.verb(MODEL_FLAGS, RECIPE),
    Verb(
        name="bench",
        line="time kernels, decode steps of whole models, a served load, or plain work that bounds them",
        arguments=("kernels|decode|serve|ceilings",),
        flags=(
            Flag(name="op", value="OP", repeated=True, help="kernels: only this op's"),
            Flag(
                name="alone", kind=bool, default=False, help="kernels: without peers and errors, which take most time"
            ),
            Flag(name="shape", value="CONFIG", repeated=True, help="decode: this config's shape, with random weights"),
            Flag(name="batch", kind=int, least=1, value="N", repeated=True, help="decode: sequences (1, 32 and 128)"),
            Flag(name="context", kind=int, least=1, value="N", help="decode: tokens of each sequence (896)"),
            Flag(name="recipe", value="R", help="decode, serve: YAML file, or a recipe that ships with optx"),
            Flag(name="require", value="BACKEND", help="decode, serve: a backend that every op must use if it has one"),
            Flag(name="against-plan", kind=bool, default=False, help="decode: predicted beside measured, op by op"),
            Flag(name="target", value="NAME", help="decode --against-plan: whose figures predict (this machine's)"),
            Flag(
                name="measured",
                value="FILE",
                repeated=True,
                help="decode --against-plan: steps that earlier runs kept with --out, instead of timing any",
            ),
            *SERVE_FLAGS,
            Flag(
                name="store",
                value="NAME",
                help="ceilings, decode --against-plan: keep what was measured as a target of yours, for --target NAME",
            ),
            Flag(name="out", value="FILE", help="write every figure there as JSON"),
            JSON,
        ),
        examples=(
            "optx bench kernels --op paged_decode --out paged_decode.json",
            "optx bench decode --shape qwen3-30b-a3b --batch 1 --batch 32 --out decode.json",
            "optx bench serve --url http://127.0.0.1:8000 --input_len 512 --concurrency 64 --slo 'ttft:1000 tpot:50'",
            "optx bench serve --in_process qwen3-8b --num_prompts 512 --input_len 512 --concurrency 256 --out bare.json",
            "optx bench ceilings --store mine",
            "optx bench decode --against-plan --store mine --out against.json",
        ),
        notes="Ceilings are measured in the same run: reading, bf16 and fp8 products. Percentages are of the one that binds. "
        f"Shapes of decode: {', '.join(SHAPES)} (by default all three), any config that ships with optx, or a config.json. "
        f"--against-plan times {against.SHAPE} under {', '.join(against.RECIPES)} at batches 1, 8 and 64 where nothing else "
        "is asked for.",
        run=cli_verbs.bench,
    ),
    cli_retrieval.verb(MODEL_FLAGS, RECIPE, CALIBRATION, JSON),
    cli_heal.verb(MODEL_FLAGS, RECIPE, TARGET, CALIBRATION, OVERWRITE, JSON),
)


def run(arguments: Sequence[str]) -> int:
    """Runs a command line without the program's name; returns the exit code."""
    try:
        if not arguments or arguments[0] in ("--help", "-h", "-help", "help") and len(arguments) == 1:
            print(overview(VERBS, optx.__version__), file=sys.stdout if arguments else sys.stderr)
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(f"optx {optx.__version__}")
            return 0
        if arguments[0] == "help":
            arguments = [*arguments[1:3], "--help"]
        if arguments[0].startswith("-"):
            raise UsageError(f"the verb comes first: optx VERB, one of {', '.join(verb.name for verb in VERBS)}")
        verb, rest = find(VERBS, arguments)
        positional, values = parse(verb, rest)
        if values["help"]:
            print(verb.help())
            return 0
        enable_compilation_cache()
        gc.freeze()  # modules stay: going through them at each collection costs planning a tenth of its time
        verb.run(*positional, **{name: value for name, value in values.items() if name != "help"})
        sys.stdout.flush()
        return 0
    except OptxError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # `optx ... | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk
        say(f"error: {error.filename or 'output'}: {error.strerror or error}")
        return 1


def main() -> None:
    """The program `optx`."""

    def parse_nothing(argv: list[str]) -> list[str]:
        flags.FLAGS(argv[:1])  # absl's own flags stay at their defaults; each verb parses its own
        logging.set_verbosity(logging.ERROR)
        return argv[1:]

    app.run(run, flags_parser=parse_nothing)
