"""Healing as a step of a recipe: the converted model is trained to answer as the uncompiled one does."""

import dataclasses
from typing import Literal

from optx.errors import PassError
from optx.ir import shallow
from optx.nn.decoder import CausalLM
from optx.registry import Axis, PassOptions, Site, Stage, register

RANGES = (  # (fields, least, most) that a value may have
    (("steps", "batch", "accumulate", "devices", "every", "held_out", "rank"), 1, 10**9),
    (("context",), 2, 10**9),
    (("sample", "seed"), 0, 2**32 - 1),
    (("prime",), 0, 10**9),
    (("converted", "others", "warmup"), 0, 1),
    (("hidden", "weight_decay", "balance"), 0, 1e9),
    (("lr", "clip"), 1e-12, 1e9),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(PassOptions):
    text: tuple[str, ...] = ()  # files of UTF-8 text, and token shards (.npy of whole numbers)
    sample: int = 0  # sequences of `context` tokens that the uncompiled model writes, beside the text
    prime: int = 0  # tokens of the text that each of them begins with, from anywhere in it
    steps: int = 300  # at most
    minutes: float | None = None  # of training, compilation not counted, at most; None: all steps
    batch: int = 16  # sequences a step
    accumulate: int = 1  # parts of a batch that run one after the other
    context: int = 512  # tokens of a sequence
    lr: float = 1e-4  # of AdamW, largest; falls to 0 as a cosine over the run
    others: float = 0.1  # share of it for what was not converted, and has all to lose
    warmup: float = 0.05  # share of a phase in which the rate rises
    clip: float = 1.0  # norm of all gradients, largest
    weight_decay: float = 0.0  # of matrices
    hidden: float = 1.0  # weight of hidden-state matching; 0: logits alone
    converted: float = 0.25  # share of the run, at its start, in which converted parts move alone
    train: Literal["all", "converted", "lora"] = "all"  # what moves after that; lora: adapters beside converted parts
    rank: int = 16  # of the adapters
    balance: float = 1e-3  # step of the selection bias of routers that have one
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of products; weights that move are float32
    seed: int = 0  # of the order of the sequences, of what is sampled, of adapters
    devices: int = 1  # that a batch is split over
    every: int = 100  # steps between checkpoints and measurements of the held-out sequences
    held_out: int = 16  # sequences that are not trained on

    def __post_init__(self):
        for names, least, most in RANGES:
            for name in names:
                if not least <= getattr(self, name) <= most:
                    raise PassError(f"distill.{name}: got {getattr(self, name)}; allowed: {least} to {most:g}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise PassError(f"distill.minutes: got {self.minutes}; allowed: above 0, or null for all steps")
        if self.batch % (self.accumulate * self.devices):
            raise PassError(
                f"distill.batch: got {self.batch}; allowed: multiples of accumulate x devices = "
                f"{self.accumulate} x {self.devices}"
            )
        if self.prime and not (self.text and self.sample and self.prime < self.context - 1):
            raise PassError(
                f"distill.prime: got {self.prime} with {len(self.text)} texts, sample: {self.sample}, context: {self.context}; "
                "it wants text, samples, and less than a sequence"
            )
        if not self.text and not self.sample:
            raise PassError("distill.text: got none; list files of text or token shards there, or set sample: N")


@register("distill", axis=Axis.QUALITY, stage=Stage.HEAL, options=Distill, exact=False)
def distill(site: Site, model: CausalLM, opt: Distill) -> CausalLM:
    """The converted model trained against the uncompiled one; shapes stay as they are, optx.heal moves the numbers.

    loss = KL(teacher || student) of the logits at temperature 1 (Hinton et al. 2015, arXiv:1503.02531) + hidden x mean over
    layers and tokens of |h_student - h_teacher|^2 / |h_teacher|^2 (hidden-state alignment: Bick et al. 2024,
    arXiv:2408.10189) + mean over the layers that choose by a trained index of KL(attention || index), whose gradient reaches the
    index alone (nn/dsa.py). AdamW divides it by its size, so that it has no weight. First converted parts move alone, then what
    `train` says.
    """
    return shallow(model)
