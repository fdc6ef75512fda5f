"""The curves of healing: KL against the uncompiled model over the run."""

import math
from collections.abc import Mapping
from pathlib import Path

from optx.heal_state import CURVES, LOG, rows
from optx.pipeline import Healing
from optx.png_report import DPI, KV, STYLE, WEIGHTS, WIDTH

SMOOTH = 0.05  # share of the run that the bold line of training is a mean over


def draw(folder: Path, healing: Healing) -> Path:
    """Writes `curves.png` beside the log. Phases are told apart by shade."""
    import numpy as np
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = rows(folder / LOG)
    train, held = ([row for row in lines if row["kind"] == kind] for kind in ("train", "held_out"))
    steps, kl = (np.asarray([row[name] for row in train]) for name in ("step", "kl"))
    width = max(1, round(SMOOTH * len(train)))
    mean = np.convolve(kl, np.ones(width) / width, "valid")
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, kl, color=WEIGHTS, alpha=0.25, linewidth=0.8)
        axes.plot(steps[width - 1 :], mean, color=WEIGHTS, linewidth=1.6, label=f"training, mean of {width} steps")
        at, found = [row["step"] for row in held], [row["kl"] for row in held]
        axes.plot(at, found, "o-", color=KV, markersize=5, linewidth=1.2, label="held-out sequences")
        for phase, shade in _phases(train):
            axes.axvspan(*phase[1:], color="#596270", alpha=shade, linewidth=0)
            axes.text(
                sum(phase[1:]) / 2, 1.01, phase[0], transform=axes.get_xaxis_transform(), ha="center", va="bottom"
            )
        axes.set(yscale="log", xlabel="step", ylabel="KL(uncompiled || converted), nats a token", xlim=(0, steps[-1]))
        axes.grid(True, which="both", axis="y", color="#e3e7ec", linewidth=0.7)
        axes.set_axisbelow(True)
        tokens, seconds = f"{healing.tokens:,} tokens", f"{healing.seconds:,.0f} s"
        axes.set_title(f"healing: KL {healing.kl[0]:.4g} to {healing.kl[1]:.4g} in {tokens}, {seconds}", pad=22)
        axes.legend(frameon=False)
        FigureCanvasAgg(figure).print_png(folder / CURVES)
    return folder / CURVES


def compare(folders: Mapping[str, Path], path: Path) -> bool:
    """Writes a PNG: a panel a run by name, KL on held-out sequences over the seconds of training. False, and nothing written,
    where the log of none is left."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    logs = {name: folder / LOG for name, folder in folders.items()}
    held = {name: [r for r in rows(log) if r["kind"] == "held_out"] for name, log in logs.items() if log.exists()}
    if not held:
        return False
    across = min(4, len(held))
    down = math.ceil(len(held) / across)
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 2.2 * down), dpi=DPI, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharex=True)
        for axes, (name, lines) in zip(panels.flat, held.items()):
            kl = [line["kl"] for line in lines]
            axes.plot([line["seconds"] for line in lines], kl, "o-", color=KV, markersize=3.5, linewidth=1.2)
            axes.set_title(f"{name}\n{kl[0]:.3g} to {kl[-1]:.3g}", fontsize=9)
            axes.set(yscale="log")
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.grid(True, which="both", axis="y", color="#e3e7ec", linewidth=0.7)
            axes.set_axisbelow(True)
        for axes in list(panels.flat)[len(held) :]:
            axes.set_axis_off()
        figure.supxlabel("seconds of training", fontsize=9)
        figure.supylabel("KL on held-out sequences, nats a token", fontsize=9)
        FigureCanvasAgg(figure).print_png(path)
    return True


def _phases(train: list[dict]) -> list[tuple[tuple[str, float, float], float]]:
    """((name, first step, last step), shade)."""
    names = list(dict.fromkeys(row["phase"] for row in train))
    spans = [[row["step"] for row in train if row["phase"] == name] for name in names]
    return [((name, at[0] - 1, at[-1]), 0.08 * (i % 2)) for i, (name, at) in enumerate(zip(names, spans, strict=True))]
