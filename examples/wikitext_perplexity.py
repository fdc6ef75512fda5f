"""Perplexity of the two small real models on WikiText-2, dense and with the file's packed blocks.

    python examples/wikitext_perplexity.py wikitext2_test.txt --windows 100

Protocol: windows of 1024 tokens, none overlapping, Gemma's start with its first token (BOS); float32 on CPU. The kept output is
`wikitext_perplexity.json` beside this file, which also holds what `transformers` 5.24 gives on the same dequantized weights.
"""

import argparse
import json
import sys
from pathlib import Path

import optx
from fetch_models import fetch

# transformers 5.24, torch 2.13 CPU, float32, on the same files' dequantized weights, 100 windows.
REFERENCE = {"smollm2": 21.2222, "gemma3": 16.2699}
OUTPUT = Path(__file__).with_suffix(".json")


def measure(name: str, weights: str, text: str, windows: int) -> dict:
    compiled = optx.compile(optx.load(fetch(name), weights=weights, dtype="float32"))
    first = compiled.evaluate(text, max_windows=min(5, windows))
    whole = first if windows <= 5 else compiled.evaluate(text, max_windows=windows, progress=sys.stderr.isatty())
    size, file = compiled.report.weight_bytes, compiled.report.file_bytes
    return {
        "model": name,
        "weights": weights,
        "windows": whole.windows,
        "perplexity": whole.perplexity,
        "perplexity_5_windows": first.perplexity,
        "transformers": REFERENCE[name],
        "ratio": whole.perplexity / REFERENCE[name],
        "weight_bytes": size,
        "share_of_file": size / file,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="WikiText-2 test set, tokenized form")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--models", nargs="+", default=list(REFERENCE), choices=list(REFERENCE))
    parser.add_argument("--weights", nargs="+", default=["dense", "packed"], choices=["dense", "packed"])
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    kept = {(r["model"], r["weights"]): r for r in json.loads(OUTPUT.read_text())} if OUTPUT.exists() else {}
    for name in args.models:
        for weights in args.weights:
            result = measure(name, weights, text, args.windows)
            kept[name, weights] = result
            print(json.dumps(result), flush=True)
            OUTPUT.write_text(json.dumps(list(kept.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
