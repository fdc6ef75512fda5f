"""The whole of optx on a real model: load, plan, compile, report, score, answer. `make demo` runs it.

python examples/quickstart.py                   # SmolLM2-135M-Instruct, fetched once (93 MB)
python examples/quickstart.py model.gguf "What is a KV cache?"
"""

import sys
import time

from rich.console import Console
from rich.text import Text

import optx
from fetch_models import FetchError, fetch
from texts import ALICE

RECIPE = "packed_kv8"  # weights stay in the file's 4-bit blocks, KV cache in int8, projections joined
QUESTION = "What does a compiler do? Answer in two sentences."

console = Console(highlight=False, soft_wrap=True)


def main(arguments: list[str]) -> None:
    began = time.perf_counter()
    optx.enable_compilation_cache()  # XLA's programs are kept for the next run
    source = optx.load(arguments[0] if arguments else fetch("smollm2"), weights="packed")
    recipe = optx.Recipe.from_yaml(RECIPE)

    title(f"{source.origin.name} with the recipe '{recipe.name}'", recipe.description)
    plan = optx.plan(source, recipe)  # on shapes: no weight has been read yet

    title("What each pass changes", "lines of the module tree, - before and + after")
    for record in plan.records:
        console.print(f"{record.name} ({record.sites} sites)", style="bold")
        for line in record.diff.splitlines():
            console.print(Text(f"  {shorten(line)}", style="red" if line.startswith("-") else "green"))

    title("What a token costs", "bytes that a decode step reads, and what the passes make of them")
    print_plain(plan)

    title("Compiling", "weights stream in block by block, through the passes, to the kernels")
    compiled = optx.compile(source, recipe, progress=sys.stderr.isatty())
    print_plain(compiled.report)

    title("Quality", "the opening of Alice's Adventures in Wonderland, every token predicted from those before it")
    score = compiled.evaluate(ALICE, context=512)
    console.print(f"perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits a byte, {score.tokens} tokens")
    console.print("(with keys and values rounded as the cache stores them)", style="dim")

    question = arguments[1] if len(arguments) > 1 else QUESTION
    title("An answer", question)
    compiled.chat(question, optx.Sampling(max_tokens=60), on_text=lambda _, text: console.print(Text(text), end=""))
    console.print(f"\n\ndone in {time.perf_counter() - began:.0f} s", style="dim")


def title(text: str, note: str) -> None:
    console.print(f"\n{text}", style="bold cyan")
    console.print(f"{note}\n", style="dim")


def print_plain(value: object) -> None:
    console.print(Text(str(value)))


def shorten(line: str, width: int = 150) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FetchError, optx.OptxError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
