"""Verbs and flags of the command line as data: parsed by absl, each verb with flags of its own, errors that teach."""

import dataclasses
import difflib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from optx.errors import UsageError, did_you_mean

WIDTH = 100  # columns of help


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag of a verb."""

    name: str
    help: str
    kind: type = str  # str, int, float or bool
    default: Any = None
    value: str = ""  # what stands for the value in help
    allowed: tuple[str, ...] = ()
    least: float | None = None  # smallest number
    required: bool = False
    repeated: bool = False  # given several times, collected into a tuple

    @property
    def usage(self) -> str:
        """`--batch N`."""
        value = "|".join(self.allowed) or self.value
        return f"--{self.name}" + ("" if self.kind is bool else f" {value}")


class _Parser(flags.ArgumentParser):
    """Text into the value of a flag; the error says what is allowed."""

    def __init__(self, flag: Flag):
        self.flag = flag
        self.syntactic_help = ""

    def parse(self, argument):
        flag = self.flag
        if flag.allowed and argument not in flag.allowed:
            near = did_you_mean(argument, flag.allowed).removeprefix("; ")
            raise ValueError(near if near.startswith("did") else f"allowed: {', '.join(flag.allowed)}")
        if flag.kind is str:
            return argument
        try:
            value = flag.kind(argument)
        except ValueError:
            value = float("nan")
        least = -float("inf") if flag.least is None else flag.least
        if not value >= least:
            number = "a whole number" if flag.kind is int else "a number"
            raise ValueError(f"allowed: {number}" + ("" if flag.least is None else f", {flag.least:g} or more"))
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """One subcommand: what it takes, what it says of itself, what it runs. `run(positional arguments, flag values)`."""

    name: str
    line: str  # one line, for the list of verbs
    arguments: tuple[str, ...]
    flags: tuple[Flag, ...]
    examples: tuple[str, ...]
    run: Callable[..., None]
    notes: str = ""

    def usage(self) -> str:
        required = [flag.usage for flag in self.flags if flag.required]
        return " ".join(["optx", self.name, *self.arguments, *required, "[flags]"])

    def help(self) -> str:
        lines = [self.line, "", f"usage: {self.usage()}", ""]
        if self.notes:
            lines += [*textwrap.wrap(self.notes, WIDTH), ""]
        column = max(len(flag.usage) for flag in self.flags) + 2
        lines.append("flags:")
        for flag in self.flags:
            wrapped = textwrap.wrap(flag.help + _default(flag), WIDTH - column - 2)
            lines.append(f"  {flag.usage.ljust(column)}{wrapped[0]}")
            lines += [" " * (column + 2) + line for line in wrapped[1:]]
        title = "example:" if len(self.examples) == 1 else "examples:"
        return "\n".join([*lines, "", title, *(f"  {line}" for line in self.examples)])


def _default(flag: Flag) -> str:
    if flag.required:
        return " (required)"
    if flag.repeated:
        return " (may be repeated)"
    return "" if flag.default is None or flag.default is False else f" (default {flag.default})"


HELP = Flag(name="help", kind=bool, default=False, help="show this text")


def parse(verb: Verb, arguments: Sequence[str]) -> tuple[list[str], Mapping[str, Any]]:
    """(positional arguments, flag values) of a verb's command line. Raises UsageError."""
    values = flags.FlagValues()
    for flag in (*verb.flags, HELP):
        _define(flag, values)
    values.set_gnu_getopt(True)
    try:
        positional = values([verb.name, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown(verb, error.flagname)) from None
    except (flags.Error, ValueError) as error:
        raise UsageError(f"{verb.name}: {_say(str(error))}") from None
    given = {flag.name: values[flag.name].value for flag in (*verb.flags, HELP)}
    if given["help"]:
        return [], given
    _check(verb, positional, given)
    return positional, {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _define(flag: Flag, values: flags.FlagValues) -> None:
    if flag.kind is bool:
        short = "h" if flag is HELP else None
        flags.DEFINE_bool(flag.name, flag.default, flag.help, values, short_name=short)
    elif flag.repeated:
        flags.DEFINE_multi(_Parser(flag), None, flag.name, [], flag.help, values)
    else:
        flags.DEFINE(_Parser(flag), flag.name, flag.default, flag.help, values)


def _check(verb: Verb, positional: Sequence[str], given: Mapping[str, Any]) -> None:
    if len(positional) < len(verb.arguments):
        raise UsageError(f"{verb.name}: {verb.arguments[len(positional)]} is missing; usage: {verb.usage()}")
    if len(positional) > len(verb.arguments):
        extra = positional[len(verb.arguments)]
        raise UsageError(f"{verb.name}: {extra!r} is one argument too many; usage: {verb.usage()}")
    for flag in verb.flags:
        if flag.required and given[flag.name] is None:
            raise UsageError(f"{verb.name}: {flag.usage} is missing; usage: {verb.usage()}")


def _unknown(verb: Verb, name: str) -> str:
    names = [flag.name for flag in (*verb.flags, HELP)]
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.6)
    hint = f"did you mean --{near[0]}?" if near else f"`optx {verb.name} --help` lists its flags"
    return f"{verb.name}: no flag --{name}; {hint}"


def _say(text: str) -> str:
    """absl's words in ours: `flag --batch=x: ...`, `Missing value for flag --batch`."""
    missing = "Missing value for flag "
    return f"{text.removeprefix(missing)} needs a value" if text.startswith(missing) else text.removeprefix("flag ")


def overview(verbs: Sequence[Verb], version: str) -> str:
    """What `optx --help` prints."""
    width = max(len(verb.name) for verb in verbs)
    return "\n".join(
        [
            f"optx {version}: a compiler for LLM inference in JAX",
            "",
            "usage: optx VERB ARGUMENTS [flags]      (optx VERB --help explains one)",
            "",
            *(f"  {verb.name.ljust(width)}  {verb.line}" for verb in verbs),
            "",
            "MODEL is a Hugging Face directory, a GGUF file, an optx export, or a hub id;",
            "to describe and plan, a config.json or the name of one that ships with optx (qwen3-8b) will do.",
            "A recipe says what to do to it: a YAML file, or the name of one that ships with optx.",
            "",
            "examples:",
            "  optx plan model.gguf --weights packed --recipe packed_kv8 --target h100",
            "  optx generate model.gguf --weights packed --recipe packed_kv8 --prompt 'What is a KV cache?' --chat",
            "",
            "exit codes: 0 done, 1 an error of the model, recipe or request, 2 a wrong command line, 130 interrupted",
        ]
    )


def find(verbs: Sequence[Verb], arguments: Sequence[str]) -> tuple[Verb, Sequence[str]]:
    """The verb that a command line begins with, one of two words before one of its first word, and the arguments after it.

    Raises UsageError naming the nearest verb.
    """
    for count in (2, 1):
        for verb in verbs:
            if verb.name == " ".join(arguments[:count]):
                return verb, arguments[len(verb.name.split()) :]
    raise UsageError(f"no verb {arguments[0]!r}{did_you_mean(arguments[0], [verb.name for verb in verbs])}")
