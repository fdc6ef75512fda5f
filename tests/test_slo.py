"""Objectives: values in base units, and what is refused with which words."""

import pytest

from optx.errors import UsageError
from optx.slo import KINDS, SLO, Bound, parse


def test_the_example():
    slo = parse("tpot<=5ms, ctx=128k, kl<=0.05")
    assert slo == SLO(bounds=(Bound(name="tpot", value=0.005), Bound(name="kl", value=0.05)), context=131072)
    assert str(slo) == "tpot<=5 ms, kl<=0.05 nats, batch=1, ctx=131,072"
    assert (slo.get("tpot"), slo.get("kl"), slo.get("memory")) == (0.005, 0.05, None)


@pytest.mark.parametrize(
    "text, value",
    [
        ("tpot<=5", 0.005),
        ("tpot<=0.01s", 0.01),
        ("ttft <= 250 us", 250e-6),
        ("weights<=60MB", 60e6),
        ("weights<=60MiB", 60 * 2**20),
        ("memory<=24GiB", 24 * 2**30),
        ("bytes<=1000", 1000),
        ("bits<=3.5", 3.5),
        ("tok/s>=200", 200),
        ("kl<=1e-3", 1e-3),
        ("kl<=.5nats", 0.5),
    ],
)
def test_units(text, value):
    (bound,) = parse(text).bounds
    assert bound.value == pytest.approx(value, rel=1e-12) and text.startswith(bound.name)


def test_settings():
    slo = parse("bits<=4,batch=8,ctx>=32k")
    assert (slo.batch, slo.context) == (8, 32768)
    assert parse("bits<=4").context is None and parse("bits<=4, ctx=1M").context == 2**20


@pytest.mark.parametrize(
    "text, told",
    [
        ("tpto<=5ms", "no objective is called 'tpto'; did you mean 'tpot'?"),
        ("qualia<=5", "no objective is called 'qualia'; allowed: batch, bits, bytes, ctx, kl, memory"),
        ("tpot>=5ms", "tpot (time per output token) takes '<=', not '>='"),
        ("tok/s<=5", "takes '>=', not '<='"),
        ("kl=0.05", "takes '<=', not '='"),
        ("tpot", "got 'tpot'; allowed: name, operator, value, as in 'tpot<=5ms"),
        ("", "got ''; allowed: name, operator, value"),
        ("tpot<=5ms,,kl<=1", "got ''; allowed: name, operator, value"),
        ("tpot<=5GB", "got '5GB'; allowed: a number and a unit, us or ms or s"),
        ("tok/s>=1k", "got '1k'; allowed: a number"),
        ("tpot<=fast", "got 'fast'; allowed: a number"),
        ("kl<=0", "kl<=0: allowed: a number above 0"),
        ("kl<=-1", "got '-1'; allowed: a number"),
        ("kl<=1e400", "allowed: a number"),
        ("bits<=4,ctx=1.5", "ctx=1.5: allowed: a whole number above 0"),
        ("bits<=4,batch=0", "batch=0: allowed: a whole number above 0"),
        ("bits<=4,bits<=3", "bits stands twice"),
        ("ctx=4k", "ctx=4k: bounds nothing; add one of tpot, ttft, tok/s, memory"),
    ],
)
def test_what_is_refused(text, told):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert str(error.value).startswith("slo: ") and told in str(error.value)


def test_every_kind_says_its_value():
    assert all(kind.text(3.0).startswith("3") for name, kind in KINDS.items() if name not in ("tpot", "ttft"))
    assert KINDS["tpot"].text(0.0051) == "5.1 ms"
