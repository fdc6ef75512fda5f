"""Dequantizes an export of optx with the compressed-tensors package and compares it with the dense export, number by number.

    python tests/golden/compare_compressed_tensors.py EXPORT DENSE     (torch, transformers and compressed-tensors in an
                                                                        environment of their own)

EXPORT: `--format compressed-tensors`, DENSE: `--format hf` of the same model. Prints one JSON object: for each format how many
matrices it has, how many are bit-equal (in float32; 4-bit floats in bfloat16, which is what the package makes of them) and the
largest difference; modules without a scheme that are not on the `ignore` list; with --logits also what transformers answers when
it loads both folders. Exits 1 on a difference.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_targets
from safetensors.torch import load_file

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def compare(export: Path, dense: Path) -> dict:
    config = json.loads((export / "config.json").read_text())
    given = QuantizationConfig.model_validate(config["quantization_config"])
    by_target = {target: scheme for scheme in given.config_groups.values() for target in scheme.targets}
    modules = defaultdict(dict)
    for name, value in load(export).items():
        owner, _, last = name.rpartition(".")
        modules[owner][last] = value
    want, linear = load(dense), torch.nn.Linear(1, 1)
    counts = defaultdict(lambda: {"matrices": 0, "equal": 0, "largest difference": 0.0})
    forgotten, names = [], set()
    for owner, state in modules.items():
        if not set(state) & set(PARTS):
            names |= {f"{owner}.{last}" for last in state}
            plain = "weight" in state and state["weight"].ndim == 2 and "embed" not in owner
            forgotten += [owner] if plain and owner not in given.ignore else []
            continue
        scheme = by_target[match_targets(owner, linear, by_target)[0]]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        expected = {n for n in compressor.compression_param_names(scheme) if not n.startswith("input")}
        assert expected == set(state) - {"bias"}, (owner, expected, set(state))
        got = compressor.decompress({k: v for k, v in state.items() if k != "bias"}, scheme)["weight"]
        right = want[f"{owner}.weight"]
        right = right.to(torch.bfloat16) if got.dtype == torch.bfloat16 else right
        names |= {f"{owner}.weight"} | ({f"{owner}.bias"} if "bias" in state else set())
        row = counts[f"{scheme.format} {scheme.weights.num_bits} {scheme.weights.strategy}"]
        row["matrices"] += 1
        row["equal"] += bool(torch.equal(got.float().to(right.dtype), right))
        row["largest difference"] = max(row["largest difference"], float((got.float() - right.float()).abs().max()))
    for owner, state in modules.items():
        for last, value in state.items():
            if last in ("bias",) or not set(state) & set(PARTS):
                assert torch.equal(value, want[f"{owner}.{last}"]), f"{owner}.{last}"
    assert names == set(want), sorted(names ^ set(want))[:4]
    return {"formats": dict(counts), "not on the ignore list": forgotten}


def logits(folder: Path, vocab: int) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(24)[None] % vocab
    with torch.no_grad():
        return model(tokens).logits


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("export", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--logits", action="store_true")
    args = parser.parse_args()
    found = compare(args.export, args.dense)
    wrong = bool(found["not on the ignore list"]) or any(f["matrices"] != f["equal"] for f in found["formats"].values())
    if args.logits:
        vocab = json.loads((args.export / "config.json").read_text())["vocab_size"]
        ours, theirs = logits(args.export, vocab), logits(args.dense, vocab)
        found["logits"] = float((ours - theirs).norm() / theirs.norm())
    print(json.dumps(found))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
