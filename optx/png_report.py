"""The report's charts as PNG files beside its text: bytes by pass, rooflines, maps of the layers.

matplotlib draws them without a display (Agg), dark on light whatever the machine's settings.
"""

from collections.abc import Sequence
from pathlib import Path

from optx import ir
from optx.cost import OpCost, StepBytes, step_bytes
from optx.estimate import estimate
from optx.report_data import LayerMap, Subject, layer_maps
from optx.roofline import roofline
from optx.target import Target

DPI = 160
WIDTH = 9.0  # inches
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7b8694",
    "axes.labelcolor": "#16191d",
    "xtick.color": "#3c4450",
    "ytick.color": "#3c4450",
    "text.color": "#16191d",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
WEIGHTS, KV, LESS, MORE = "#1f5fc4", "#b4560b", "#1a7a3c", "#b3261e"
COLORS = {
    "matmul": "#1f5fc4",
    "experts": "#7a3fc0",
    "head": "#0b7285",
    "attention": "#b4560b",
    "state": "#a61e4d",
    "vectors": "#596270",
}
FILES = (
    "waterfall",
    "roofline_decode",
    "roofline_prefill",
    "bytes",
    "error",
    "output",
)  # .png, in the order they are written


def write(subject: Subject, folder: Path, *, batch: int = 1, context: int | None = None) -> list[Path]:
    """Those of FILES that there is something to draw in; the folder exists. Paths of what was written.

    Raises: LoweringError when no kernel takes a call on the target.
    """
    from matplotlib import style  # slow to import, as is all that draws

    context = context or subject.trees[-1].context
    bounds = estimate(subject.trees[-1], subject.target, batch=batch, context=context)
    steps = [step_bytes(tree, batch, context) for tree in subject.trees]
    names = [record.name for record in subject.records]
    drawn = {"waterfall": lambda: _waterfall(subject.title, names, steps)}
    if subject.target.bandwidth:
        for name, step in (("decode", bounds.decode), ("prefill", bounds.prefill)):
            drawn[f"roofline_{name}"] = lambda name=name, step=step: _roofline(name, step.ops, subject.target)
    for found in layer_maps(bounds.decode.ops, subject.records):
        drawn[found.name] = lambda found=found: _layer_map(found)
    paths = []
    for name in FILES:
        if name in drawn:
            with style.context(["default", STYLE]):
                paths.append(folder / f"{name}.png")
                drawn[name]().savefig(paths[-1], dpi=DPI)
    return paths


def _figure(height: float):
    from matplotlib.figure import Figure  # without pyplot: no window, nothing kept

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _waterfall(title: str, names: Sequence[str], steps: Sequence[StepBytes]):
    """Whole steps in weights and KV, passes as what they change."""
    rows = ["input", *names, "result"] if names else ["input"]
    figure, axes = _figure(1.3 + 0.42 * len(rows))
    most = max(step.total for step in steps)
    wholes = [(0, steps[0])] + ([(len(rows) - 1, steps[-1])] if names else [])
    for y, step in wholes:
        axes.barh(y, step.weights, color=WEIGHTS, label="weights" if y == 0 else None)
        axes.barh(y, step.kv, left=step.weights, color=KV, label="KV and states" if y == 0 else None)
        axes.text(step.total + 0.01 * most, y, ir.size_text(step.total), va="center")
    kinds = {LESS: "saved by a pass", MORE: "added by a pass"}  # what the legend does not have yet
    for y, (old, new) in enumerate(zip(steps, steps[1:]), start=1):
        change = new.total - old.total
        color = MORE if change > 0 else LESS
        label = kinds.pop(color, None) if abs(change) >= 1 else None
        axes.barh(y, abs(change), left=min(old.total, new.total), color=color, label=label)
        sign = "+" if change > 0 else "\u2212"
        said = f"{sign}{ir.size_text(abs(change))}" if abs(change) >= 1 else "no change"
        axes.text(max(old.total, new.total) + 0.01 * most, y, said, va="center")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.17 * most)
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if most >= pair[1]), ("B", 1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / size:g}")
    axes.set_xlabel(f"{unit} a decode step of {steps[-1].batch:,} x {steps[-1].context:,} tokens")
    axes.set_title(title)
    figure.legend(loc="outside lower right", ncols=4, frameon=False)
    return figure


def _roofline(name: str, ops: Sequence[OpCost], target: Target):
    """Every op where its intensity puts it under the roof; a dot's area is its share of the time."""
    plot = roofline(ops, target)
    figure, axes = _figure(5.0)
    intensities = [dot.intensity for dot in plot.dots]
    ridges = [roof.peak / target.bandwidth for roof in plot.roofs if roof.peak]
    low, high = min([*intensities, *ridges]) / 3, max([*intensities, *ridges]) * 4
    for roof in plot.roofs:
        corner = min(roof.peak / target.bandwidth, high) if roof.peak else high
        line = [(low, low * target.bandwidth), (corner, corner * target.bandwidth)]
        line += [(high, roof.peak)] if roof.peak else []
        axes.plot(*zip(*line, strict=True), color="#16191d", linewidth=1.5, zorder=1)
        if roof.peak:
            told = f"{roof.dtype} {roof.peak / 1e12:,.4g} TFLOP/s"
            axes.annotate(told, (high, roof.peak), (0, 24), textcoords="offset points", ha="right")
    for kind in plot.kinds:
        dots = [dot for dot in plot.dots if dot.op == kind]
        axes.scatter(
            [dot.intensity for dot in dots],
            [dot.rate for dot in dots],
            s=[30 + 900 * dot.share for dot in dots],
            color=COLORS[kind],
            alpha=0.55,
            edgecolors=COLORS[kind],
            linewidths=1.2,
            zorder=2,
            label=kind,
        )
    tops = [dot.rate for dot in plot.dots] + [roof.peak for roof in plot.roofs if roof.peak]
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations a byte", ylabel="FLOP/s, at most")
    axes.set_ylim(top=4 * max(tops))
    axes.grid(True, color="#e3e7ec", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.set_title(f"{name} on {target}: {target.bandwidth / 1e12:.3g} TB/s, area is the share of the time", pad=14)
    legend = axes.legend(loc="lower right", frameon=True, framealpha=1, edgecolor="#d5dae1")
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    return figure


def _layer_map(found: LayerMap):
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    grid = np.array([[np.nan if value is None else value for value in found.row(part)] for part in found.parts])
    figure, axes = _figure(1.5 + 0.3 * len(found.parts))
    scale = LinearSegmentedColormap.from_list("heat", ["#eef1f4", "#f4b183", "#e8590c", "#7a2a00"])
    colors = scale.with_extremes(bad="white")
    image = axes.imshow(grid, aspect="auto", cmap=colors, vmin=found.least, vmax=max(found.most, found.least + 1e-12))
    axes.set_yticks(range(len(found.parts)), found.parts)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_title(found.title)
    bar = figure.colorbar(image, pad=0.02)
    bar.outline.set_visible(False)
    said = ir.size_text if found.name == "bytes" else lambda value: f"{100 * value:.3g} %"
    bar.ax.yaxis.set_major_formatter(lambda value, _: said(value))
    for x in np.arange(0.5, len(found.layers) - 1):
        axes.axvline(x, color="white", linewidth=0.8)
    for y in np.arange(0.5, len(found.parts) - 1):
        axes.axhline(y, color="white", linewidth=0.8)
    return figure
