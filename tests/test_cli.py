"""The command line as a user meets it: what it prints where, exit codes, errors that name the nearest right thing."""

import json
import re
import signal
import subprocess
import sys

import pytest
import tiny

import optx
from optx import cli
from optx.configs import model_names

VERBS = [verb.name for verb in cli.VERBS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "fox.txt"
    path.write_text(tiny.TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "compiled"
    assert cli.run(["compile", str(model), "--recipe", "int8_kv8", "--out", str(out)]) == 0
    return out


@pytest.fixture
def optx_(capsys):
    """Runs a command line -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def fails(result, code, *told):
    """The command failed with one line on stderr that says all of `told`, and nothing on stdout."""
    got, out, err = result
    assert (got, out) == (code, ""), (got, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in told:
        assert part in err, err


# Help


def test_help_lists_every_verb_with_two_examples(optx_):
    code, out, err = optx_("--help")
    assert (code, err) == (0, "")
    assert all(re.search(rf"^  {verb} +\w", out, re.M) for verb in VERBS)
    assert out.split("examples:")[1].count("optx ") == 2
    assert optx_("help")[1] == optx_("-h")[1] == out


def test_no_arguments_is_a_usage_error_that_shows_the_help(optx_):
    code, out, err = optx_()
    assert (code, out) == (2, "")
    assert "usage: optx VERB" in err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_teaches_it(optx_, verb):
    code, out, err = optx_(*verb.split(), "--help")
    assert (code, err) == (0, "")
    assert f"usage: optx {verb} " in out and "example" in out
    flags = next(v for v in cli.VERBS if v.name == verb).flags
    assert all(flag.usage in out for flag in flags)
    assert max(map(len, out.splitlines())) <= 120
    assert optx_("help", *verb.split())[1] == optx_(*verb.split(), "-h")[1] == out


def test_examples_in_help_parse():
    for verb in cli.VERBS:
        for line in verb.examples:
            words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]
            found, rest = cli.find(cli.VERBS, words[1:])
            assert words[0] == "optx" and found is verb
            positional, values = cli.parse(verb, rest)
            assert len(positional) == len(verb.arguments)


def test_defaults_stand_in_help(optx_):
    out = optx_("eval", "--help")[1]
    assert "(default 1024)" in out
    assert "(default 0)" in optx_("generate", "--help")[1]


def test_version(optx_):
    assert optx_("--version") == (0, f"optx {optx.__version__}\n", "")


# Wrong command lines: exit code 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pln", "x"], ["'pln'", "did you mean 'plan'?"]),
        (["xyzzy"], ["'xyzzy'", "describe", "generate"]),
        (["--json", "plan"], ["the verb comes first"]),
        (["plan"], ["MODEL|CONFIG is missing", "usage: optx plan"]),
        (["plan", "a", "b"], ["'b' is one argument too many"]),
        (["plan", "a", "--contxt", "3"], ["--contxt", "did you mean --context?"]),
        (["generate", "a", "--max-tokens", "3"], ["did you mean --max_tokens?"]),
        (["plan", "a", "--zzz"], ["--zzz", "optx plan --help"]),
        (["describe", "a", "--prompt", "x"], ["describe: no flag --prompt"]),  # a flag of another verb
        (["plan", "a", "--batch", "x"], ["--batch=x", "a whole number, 1 or more"]),
        (["plan", "a", "--batch", "0"], ["--batch=0", "1 or more"]),
        (["plan", "a", "--batch", "1.5"], ["--batch=1.5", "a whole number"]),
        (["generate", "a", "--prompt", "b", "--temperature", "warm"], ["--temperature=warm", "a number"]),
        (["plan", "a", "--weights", "pakced"], ["did you mean 'packed'?"]),
        (["plan", "a", "--dtype", "int4"], ["--dtype=int4", "float32, bfloat16, float16"]),
        (["plan", "a", "--json=maybe"], ["--json=maybe"]),
        (["generate", "a"], ["--prompt TEXT is missing"]),
        (["generate", "a", "--prompt"], ["--prompt needs a value"]),
        (["compile", "a", "--recipe", "int8_kv8"], ["--out DIR is missing"]),
        (["export", "a", "--format", "gguf", "--out", "b"], ["--format gguf", "not supported yet; supported: hf"]),
        (["export", "a", "--format", "hff", "--out", "b"], ["did you mean 'hf'?"]),
    ],
)
def test_usage_errors(optx_, arguments, told):
    fails(optx_(*arguments), 2, *told)


def test_calibration_where_nothing_is_lossy(optx_, model, tmp_path, text):
    out, recipe = tmp_path / "out", tmp_path / "exact.yaml"
    recipe.write_text("lower:\n  - {pass: fuse_projections}\n")
    result = optx_("compile", model, "--recipe", recipe, "--out", out, "--calibration", text)
    fails(result, 2, "--calibration", "no pass here is lossy (fuse_projections)")
    assert not out.exists()
    fails(optx_("eval", model, "--text", text, "--calibration", text), 2, "no recipe")


def test_calibration_shows_what_each_pass_cost(optx_, model, tmp_path, text):
    flags = ("--recipe", "int8_kv8", "--calibration", text)
    code, shown, _ = optx_("compile", model, *flags, "--out", tmp_path / "out")
    assert code == 0 and "quality against the uncompiled model" in shown
    code, shown, _ = optx_("eval", model, *flags, "--text", text, "--context", 64, "--json")
    lossy = [record["quality"] for record in json.loads(shown)["passes"] if not record["exact"]]
    assert code == 0 and len(lossy) == 2 and all(0 <= q["kl"] < 0.01 and q["errors"] for q in lossy)


def test_a_broken_budget_writes_nothing(optx_, model, tmp_path, text):
    out, recipe = tmp_path / "out", tmp_path / "budget.yaml"
    recipe.write_text("max_kl: 1.0e-4\nweights:\n  - {pass: quantize_weights, format: int2, group: 16}\n")
    result = optx_("compile", model, "--recipe", recipe, "--out", out, "--calibration", text)
    fails(result, 1, "recipe.max_kl: quantize_weights brings the KL to", "layers/")
    assert not out.exists()
    fails(optx_("compile", model, "--recipe", recipe, "--out", out), 1, "recipe.max_kl", "--calibration FILE")
    result = optx_("compile", model, "--recipe", recipe, "--out", out, "--calibration", tmp_path / "none.txt")
    fails(result, 1, "calibration: ", "no such file or directory")


# Errors of models, recipes and texts: exit code 1


def test_a_wrong_path_names_the_nearest(optx_, model):
    fails(optx_("describe", model.with_name("tiny-lama")), 1, "no such file or directory", f"did you mean '{model}'?")
    fails(optx_("plan", model / "confg.json"), 1, "did you mean", "config.json")
    fails(optx_("plan", model.parent / "nowhere" / "x.gguf"), 1, "the folder", "does not exist")


def test_a_wrong_target_recipe_pass_and_key_name_the_nearest(optx_, model, tmp_path):
    fails(optx_("plan", model, "--target", "h10"), 1, "did you mean 'h100'?")
    fails(optx_("plan", model, "--recipe", "int4_kv9"), 1, "did you mean 'int4_kv8'?")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("cache:\n- {pass: quantise_kv}\n")
    fails(optx_("plan", model, "--recipe", recipe), 1, "recipe.cache[0].pass", "did you mean 'quantize_kv'?")
    recipe.write_text("cache:\n- {pass: quantize_kv, fromat: int8}\n")
    fails(optx_("plan", model, "--recipe", recipe), 1, "recipe.cache[0].fromat", "did you mean 'format'?")


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "no such file"), (b"caf\xe9 au lait", "not UTF-8: byte 0xe9 at 3"), (b"", "0 tokens")],
)
def test_eval_refuses_a_text(optx_, model, tmp_path, content, told):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    fails(optx_("eval", model, "--text", path, "--context", 64), 1, told)


def test_eval_refuses_a_context_beyond_the_models(optx_, model, text):
    fails(optx_("eval", model, "--text", text), 1, "1024", "256")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 400], "the context is 256"),
        (["--prompt", "a\udcff"], "surrogate"),  # what Python makes of an argument that is not UTF-8
        (["--prompt", "a", "--top_p", "2"], "sampling.top_p"),
        (["--prompt", "a", "--max_tokens", "0"], "sampling.max_tokens"),
        (["--prompt", "a", "--stop", ""], "sampling.stop"),
    ],
)
def test_generate_refuses_a_request(optx_, model, arguments, told):
    fails(optx_("generate", model, *arguments), 1, told)


def test_an_occupied_folder_is_refused_before_the_work(optx_, model, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    for verb in (["compile", model, "--recipe", "int8_kv8"], ["export", model, "--format", "hf"]):
        fails(optx_(*verb, "--out", tmp_path), 1, "exists and is not empty", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made(optx_, model, tmp_path):
    (tmp_path / "file").write_text("")
    fails(optx_("export", model, "--format", "hf", "--out", tmp_path / "file" / "out"), 1, "cannot be written")


def test_a_failed_compile_leaves_nothing(optx_, model, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("weights:\n- {pass: quantize_weights, format: int4, group: 48}\n")
    fails(optx_("compile", model, "--recipe", recipe, "--out", tmp_path / "out"), 1, "group 48")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


# describe and plan


def test_describe(optx_, model):
    code, out, err = optx_("describe", model)
    assert (code, err) == (0, "")
    assert "tiny-llama" in out and "q: Linear f32[64, 64]" in out
    facts = json.loads(optx_("describe", model, "--json")[1])
    assert facts["family"] == "llama" and facts["context"] == 256
    assert facts["modules"][0]["text"].startswith("CausalLM")


def test_a_bare_config_is_enough_to_describe_and_plan(optx_, model, tmp_path):
    config = tmp_path / "mine.json"
    config.write_text((model / "config.json").read_text())
    code, out, _ = optx_("describe", config)
    assert code == 0 and "q: Linear f32[64, 64]" in out
    assert json.loads(optx_("describe", config, "--json", "--dtype", "bfloat16")[1])["dtype"] == "bfloat16"
    code, out, _ = optx_("plan", config, "--recipe", "int8_kv8", "--target", "h100", "--json")
    whole = json.loads(optx_("plan", model, "--recipe", "int8_kv8", "--target", "h100", "--json")[1])
    assert json.loads(out)["after"] == whole["after"]
    fails(optx_("generate", config, "--prompt", "a"), 1, "a config holds no weights")
    fails(optx_("plan", config, "--weights", "packed"), 1, "'packed' is for GGUF files")


def test_a_shipped_config_is_found_by_its_name(optx_, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing of that name stands there
    code, out, err = optx_("describe", "gpt-oss-20b", "--weights", "packed")
    assert (code, err) == (0, "") and "config, without weights" in out
    assert "gate_up: GroupedLinear mxfp4[32, 2880, 5760]" in out
    plan = json.loads(optx_("plan", "qwen3-8b", "--target", "h100", "--json")[1])
    assert plan["model"] == "qwen3-8b" and plan["before"]["kv_per_token"] == 147_456
    fails(optx_("generate", "qwen3-8b", "--prompt", "a"), 1, "a config holds no weights")
    fails(optx_("plan", "qwen3-8b", "--weights", "packed"), 1, "this one's tensors are dense")
    fails(optx_("plan", "Qwen3_8B"), 1, "Qwen3_8B: no such file", "configs that ship with optx", "qwen3-8b")
    fails(optx_("plan", "nothing-like-it"), 1, "optx.configs.model_names() lists the configs")


@pytest.mark.parametrize("name", model_names())
def test_every_shipped_config_is_planned_and_described(name, optx_):
    code, out, err = optx_("plan", name, "--target", "h100", "--batch", 8, "--context", 4096)
    assert (code, err) == (0, "") and out.startswith(f"{name} for h100")
    code, out, err = optx_("describe", name, "--json")
    assert (code, err) == (0, "") and json.loads(out)["form"] == "config, without weights"


def test_a_path_comes_before_a_shipped_name(optx_, model, tmp_path, monkeypatch):
    (tmp_path / "qwen3-8b").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert json.loads(optx_("describe", "qwen3-8b", "--json")[1])["family"] == "llama"


def test_plan_counts_bytes_before_and_after_each_pass(optx_, model):
    arguments = ["plan", model, "--recipe", "int8_kv8", "--target", "h100", "--batch", 4, "--context", 100]
    code, out, err = optx_(*arguments)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [
        row[0] for row in rows if row and row[0] in ("(input)", "quantize_weights", "quantize_kv", "fuse_projections")
    ]
    assert "h100 has 80.0 GB" in out and "at least" in out
    plan = json.loads(optx_(*arguments, "--json")[1])
    # 2 layers, 2 kv heads of 16 numbers, K and V: float32, then int8 with a float16 scale
    assert plan["before"]["kv_per_token"] == 2 * 2 * 2 * 16 * 4
    assert plan["after"]["kv_per_token"] == 2 * 2 * 2 * (16 + 2)
    assert plan["after"]["kv_read"] == 400 * plan["after"]["kv_per_token"]
    assert plan["after"]["total"] == plan["after"]["weights_read"] + plan["after"]["kv_read"]
    assert plan["step_seconds_at_least"] == pytest.approx(plan["after"]["total"] / 3.35e12)
    steps = [entry["step"] for entry in plan["passes"]]
    assert [entry["pass"] for entry in plan["passes"]] == ["quantize_weights", "quantize_kv", "fuse_projections"]
    assert steps[0]["before"] == plan["before"] and steps[-1]["after"] == plan["after"]
    assert all(a["after"] == b["before"] for a, b in zip(steps, steps[1:]))


def test_plan_beyond_the_models_context_says_so(optx_, model):
    code, out, err = optx_("plan", model, "--context", 40960, "--json")
    assert code == 0 and json.loads(out)["context"] == 40960
    assert err.startswith("note: ") and "256" in err


# compile, generate, eval, export


def test_compile_writes_what_load_takes(optx_, model, tmp_path):
    out, dump = tmp_path / "out", tmp_path / "dump"
    code, printed, err = optx_("compile", model, "--recipe", "int8_kv8", "--out", out, "--dump", dump, "--json")
    assert (code, err) == (0, "")
    assert [record["pass"] for record in json.loads(printed)["records"]][0] == "quantize_weights"
    assert sorted(path.name for path in dump.iterdir())[0] == "00_input.txt"
    assert optx.load(out).recipe.name == "int8_kv8"
    code, printed, _ = optx_("compile", model, "--recipe", "int8_kv8", "--out", out, "--overwrite")
    assert code == 0 and "kernels:" in printed and str(out) in printed


def test_an_export_is_not_compiled_again(optx_, compiled, tmp_path):
    fails(
        optx_("compile", compiled, "--recipe", "int4_kv8", "--out", tmp_path / "x"),
        1,
        "compiled with recipe 'int8_kv8'",
    )
    fails(optx_("describe", compiled, "--dtype", "bfloat16"), 1, "keeps the dtype")


def test_generate_streams_the_answer(optx_, compiled):
    arguments = ["generate", compiled, "--prompt", "The quick brown", "--max_tokens", 6]
    code, out, err = optx_(*arguments)
    assert code == 0 and err.startswith("[") and "6 new" in err
    answer = json.loads(optx_(*arguments, "--json")[1])
    assert answer["text"] + "\n" == out
    assert len(answer["token_ids"]) == 6 and answer["finish"] == "length"


def test_generate_stops_and_samples(optx_, compiled):
    def ask(*more):
        code, out, _ = optx_("generate", compiled, "--prompt", "The quick", "--max_tokens", 8, "--json", *more)
        assert code == 0
        return json.loads(out)

    plain = ask()
    stop = plain["text"][1:3]
    stopped = ask("--stop", "never seen", "--stop", stop)
    assert stopped["text"] == plain["text"].split(stop)[0] and stopped["finish"] == "stop"
    warm = ["--temperature", 1.5, "--top_k", 50, "--top_p", 0.95]
    assert ask(*warm, "--seed", 1)["token_ids"] == ask(*warm, "--seed", 1)["token_ids"]
    assert ask(*warm, "--seed", 1)["token_ids"] != ask(*warm, "--seed", 2)["token_ids"]


def test_generate_chat_uses_the_template(optx_, compiled):
    ask = ["generate", compiled, "--prompt", "Hi", "--max_tokens", 1, "--json"]
    plain, chat = (json.loads(optx_(*ask, *more)[1])["prompt_tokens"] for more in ([], ["--chat"]))
    tokenizer = optx.load(compiled).tokenizer
    assert plain == len(tokenizer.encode("Hi"))
    assert chat == len(tokenizer.encode("<|user|>Hi<|assistant|>", add_special=False))


def test_eval_against_the_dense_model(optx_, compiled, model, text):
    arguments = ["eval", compiled, "--text", text, "--context", 64, "--max_windows", 3, "--against", model]
    code, out, _ = optx_(*arguments, "--json")
    result = json.loads(out)
    assert code == 0 and result["windows"] == 3
    assert result["perplexity"] > 1 and 0 <= result["kl"] < 0.05 and 0.8 < result["top1"] <= 1
    code, out, _ = optx_(*arguments)
    assert code == 0 and f"{result['perplexity']:.4f}" in out and "KL" in out and "top-1" in out
    half = json.loads(optx_("eval", model, "--text", text, "--context", 64, "--stride", 32, "--json")[1])
    assert "kl" not in half and half["windows"] > 3


def test_export_hf_gives_the_same_model(optx_, compiled, tmp_path, text):
    code, out, err = optx_("export", compiled, "--format", "hf", "--out", tmp_path / "hf")
    assert (code, err) == (0, "") and "float32 safetensors" in out

    def score(path, *flags):
        command = ("eval", path, *flags, "--text", text, "--context", 64, "--max_windows", 2, "--json")
        return json.loads(optx_(*command)[1])

    cache = tmp_path / "cache.yaml"  # HF files hold weights, not how keys and values are stored
    cache.write_text("cache: [{pass: quantize_kv, format: int8}]\n")
    again = score(tmp_path / "hf", "--recipe", cache)
    assert again["perplexity"] == pytest.approx(score(compiled)["perplexity"], rel=1e-4)


# The program


def test_interrupt_is_130(optx_, model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(optx, "load", interrupted)
    assert optx_("describe", model) == (130, "", "interrupted\n")


def test_python_m_optx(model, tmp_path):
    def call(*arguments, **options):
        command = [sys.executable, "-m", "optx", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, **options)

    good = call("describe", model, "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["family"] == "llama"
    bad = call("descrbe", model)
    assert (bad.returncode, bad.stdout) == (2, "") and "did you mean 'describe'?" in bad.stderr
    assert "Traceback" not in bad.stderr
    wrong = call("describe", "nowhere.gguf")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: nowhere.gguf: no such file")


def test_ctrl_c_while_text_streams(tmp_path):
    """So many tokens that they are not through before the signal arrives. Python does not hear it where the tests run in the
    background, and is told to."""
    heard = "import runpy, signal as s; s.signal(s.SIGINT, s.default_int_handler); runpy.run_module('optx', None, '__main__')"
    model = tiny.checkpoint(tmp_path / "long", num_hidden_layers=1, max_position_embeddings=1 << 17)
    command = [sys.executable, "-c", heard, "generate", str(model), "--prompt", "i", "--max_tokens", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        assert process.stdout.read(1)
        for _ in range(20):  # Python loses an interrupt that falls into a finalizer
            process.send_signal(signal.SIGINT)
            try:
                _, err = process.communicate(timeout=10)
                break
            except subprocess.TimeoutExpired:
                pass
    finally:
        process.kill()
    assert b"Traceback" not in err
    assert process.returncode == 130 and err.endswith(b"interrupted\n")


def test_a_reader_that_leaves_is_no_error(model, tmp_path):
    """`optx describe ... | head -1`."""
    command = [sys.executable, "-m", "optx", "describe", str(model), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


# Benchmarks


def test_ceilings_of_this_machine(optx_):
    code, out, _ = optx_("bench", "ceilings", "--json")
    measured = json.loads(out)["ceilings"]
    assert code == 0 and measured["read"] > 1e8 and measured["bf16"] > 1e8 and measured["fp8"] is None


def test_bench_errors(optx_):
    fails(optx_("bench", "kernels"), 1, "this machine runs on cpu, which has no kernels")
    fails(optx_("bench", "kernel"), 2, "bench: 'kernel'; did you mean 'kernels'?")
    fails(
        optx_("bench", "kernels", "--op", "paged_decod"),
        2,
        "no cases for op 'paged_decod'; did you mean 'paged_decode'?",
    )
