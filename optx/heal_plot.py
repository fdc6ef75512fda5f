"""The curve of a healing run: KL against the uncompiled model over the tokens trained on."""

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


def _phases(train: list[dict]) -> list[tuple[tuple[str, float, float], float]]:
    """((name, first step, last step), shade)."""
    names = list(dict.fromkeys(row["phase"] for row in train))
    spans = [[row["step"] for row in train if row["phase"] == name] for name in names]
    return [((name, at[0] - 1, at[-1]), 0.08 * (i % 2)) for i, (name, at) in enumerate(zip(names, spans, strict=True))]
