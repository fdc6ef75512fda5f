"""A step spread over devices: what each holds, and what they tell each other."""

import dataclasses
import math
from collections.abc import Iterator

from flax import nnx

from optx import ir, tensor
from optx.cache import CacheSpec
from optx.errors import UsageError

TENSOR = {"heads", "kv_heads", "mlp", "inner", "vocab"}  # logical axes that tensor parallelism splits
EXPERT = "experts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices that share one copy of a model: `expert` groups of `tensor` devices each. A group holds the layers, split over
    its devices (Megatron-LM, arXiv:1909.08053), and serves its share of the sequences; experts are split over the groups."""

    tensor: int = 1
    expert: int = 1

    def __post_init__(self):
        if self.tensor < 1 or self.expert < 1:
            raise UsageError(f"mesh: tensor {self.tensor}, expert {self.expert}; allowed: at least 1 each")

    @property
    def devices(self) -> int:
        return self.tensor * self.expert

    def __str__(self):
        parts = [f"{n} x {name}" for name, n in (("tensor", self.tensor), ("expert", self.expert)) if n > 1]
        return ", ".join(parts) or "one device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between the devices of a mesh."""

    path: str
    kind: str  # all_reduce, all_to_all, all_gather
    sent: float  # bytes that each device sends; it receives as many

    def seconds(self, link: float | None) -> float | None:
        """link: bytes/s of a device, both ways together. Without latencies."""
        return self.sent / (link / 2) if link else None


def check(tree: nnx.Module, mesh: Mesh) -> None:
    """Raises UsageError for a mesh that splits no weight of the tree by one of its axes."""
    whole = [v.get_value().shape for v in ir.params(tree).values() if EXPERT in (v.get_metadata().get("axes") or ())]
    experts = {shape[0] for shape in whole if len(shape) == 3}
    if mesh.expert > 1 and not any(n % mesh.expert == 0 for n in experts):
        said = f"{' or '.join(map(str, sorted(experts)))} experts" if experts else "no experts"
        raise UsageError(f"mesh: {mesh.expert} groups of experts; the model has {said}; allowed: a divisor, or 1")
    devices = dataclasses.replace(mesh, expert=1)
    if mesh.tensor > 1 and all(n == 1 for n in parts_of(tree, devices).values()):
        raise UsageError(
            f"mesh: tensor {mesh.tensor} divides no heads or widths of the model; allowed: a divisor, or 1"
        )


def split(axes, shape, mesh: Mesh) -> int:
    """Into how many parts a parameter with these logical axes falls: axes that do not divide stay whole."""
    parts = 1
    for axis, size in zip(axes or (), shape, strict=False):
        by = mesh.expert if axis == EXPERT else mesh.tensor if axis in TENSOR else 1
        parts *= by if size % by == 0 else 1
        mesh = dataclasses.replace(mesh, tensor=1) if axis in TENSOR else mesh  # once a parameter
    return parts


def parts_of(tree: nnx.Module, mesh: Mesh) -> dict[str, float]:
    """By module: its own weight bytes over those that one device holds."""
    found = {}
    for path, module in ir.walk(tree):
        own = [v for v in vars(module).values() if isinstance(v, nnx.Variable)]
        whole = sum(tensor.nbytes(v.get_value()) for v in own)
        if whole:
            each = sum(
                tensor.nbytes(v.get_value()) / split(v.get_metadata().get("axes"), v.get_value().shape, mesh)
                for v in own
            )
            found[path] = whole / each
    return found


def cache_parts(spec: CacheSpec, mesh: Mesh) -> int:
    """Over how many of the devices of a group a cache falls: by its heads, or a state's channels where it has no heads; a
    latent that all heads share is on each."""
    if spec.holds_tokens:
        return math.gcd(max(stream.shape[0] for stream in spec.streams), mesh.tensor)
    channels = (s.shape[0] if len(s.shape) > 2 else max(s.shape) for s in spec.streams)
    return math.gcd(mesh.tensor, *channels)


def collectives(tree: nnx.Module, mesh: Mesh, tokens: int, rows: int) -> tuple[Collective, ...]:
    """Of one step in which a group has `tokens` tokens of `rows` rows: a ring all-reduce after every part of a block whose
    last product is split along its inputs, tokens to their experts and back, and the logits of the rows together."""
    return tuple(_collectives(tree, mesh, tokens, rows))


def _collectives(tree, mesh, tokens, rows) -> Iterator[Collective]:
    d = tree.embed.table.get_value().shape[-1]
    size = tree.embed.table.get_value().dtype.itemsize
    t, e = mesh.tensor, mesh.expert
    for i, layer in enumerate(tree.layers):
        for name in ("mixer", "mlp"):
            part = getattr(layer, name)
            if part is None:
                continue
            path = f"layers/{i}/{name}"
            if t > 1 and any(_rows_split(v, mesh) for v in ir.params(part).values()):
                yield Collective(path=path, kind="all_reduce", sent=2 * (t - 1) / t * tokens * d * size)
            if e > 1:
                for router in _routers(part):
                    moved = tokens / t * router.top_k * (e - 1) / e * d * size
                    yield from [Collective(path=path, kind="all_to_all", sent=moved)] * 2
    if t > 1:
        vocab = tree.embed.table.get_value().shape[0]
        yield Collective(path="head", kind="all_gather", sent=(t - 1) / t * rows * vocab * 4)


def _rows_split(variable: nnx.Variable, mesh: Mesh) -> bool:
    """Whether a product with this weight sums over inputs that lie on several devices."""
    axes, shape = variable.get_metadata().get("axes") or (), variable.get_value().shape
    return len(shape) > 1 and axes[-1] == "embed" and axes[-2] in TENSOR and shape[-2] % mesh.tensor == 0


def _routers(part: nnx.Module) -> list[nnx.Module]:
    return [module.router for _, module in ir.walk(part) if "router" in vars(module)]
