"""Heat maps of a retrieval run: a panel for each recipe, depth of the needle over length of the prompt, with the score."""

import math
from pathlib import Path

from optx.bench.retrieval_table import Outcome, Row, retained
from optx.png_report import DPI, STYLE

ACROSS = 4  # panels side by side, at most
PANEL, EDGE = (0.62, 0.42), (1.15, 1.25)  # inches: of a cell, and of what stands around a panel
LEAST = 2.4  # inches: width of a panel, for its title
DARK = 0.55  # score from which a cell's figure is white
COLOURS = ("#f3f5f8", "#bcd3ee", "#5d95d6", "#1f5fc4", "#0d2f6e")  # one hue, light to dark: prints in grey too


def draw(outcome: Outcome, path: Path) -> bool:
    """Writes a PNG. False, and nothing written, where every recipe was refused."""
    rows = [row for row in outcome.rows if row.cells]
    if not rows:
        return False
    from matplotlib import style
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    across = min(ACROSS, len(rows))
    down = math.ceil(len(rows) / across)
    lengths, depths = _axes(rows[0])
    width = max(LEAST, PANEL[0] * len(lengths) + EDGE[0])
    size = (across * width + 1.1, down * (PANEL[1] * len(depths) + EDGE[1]) + 0.4)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        colours = LinearSegmentedColormap.from_list("score", COLOURS)
        for i, panel in enumerate(panels.flat):
            if i >= len(rows):
                panel.axis("off")
                continue
            image = _panel(panel, rows[i], outcome, colours)
            if i % across == 0:
                panel.set_ylabel("depth of the needle")
            if i >= len(rows) - across:  # nothing stands below it
                panel.set_xlabel("tokens of the prompt")
                panel.tick_params(labelbottom=True)
        bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, label="right answers")
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        figure.suptitle(outcome.title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        figure.savefig(path, dpi=DPI)
    return True


def _axes(row: Row) -> tuple[list[int], list[float]]:
    return list(dict.fromkeys(cell.length for cell in row.cells)), list(dict.fromkeys(cell.depth for cell in row.cells))


def _panel(panel, row: Row, outcome: Outcome, colours):
    import numpy as np

    lengths, depths = _axes(row)
    scores = {(cell.length, cell.depth): cell.score for cell in row.cells}
    grid = np.array([[scores[n, d] for n in lengths] for d in depths])
    image = panel.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=1)
    panel.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    for (y, x), score in np.ndenumerate(grid):
        panel.text(
            x,
            y,
            f"{100 * score:.0f}",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if score >= DARK else "#16191d",
        )
    for x in np.arange(0.5, len(lengths) - 1):
        panel.axvline(x, color="white", linewidth=1)
    for y in np.arange(0.5, len(depths) - 1):
        panel.axhline(y, color="white", linewidth=1)
    kept = None if row is outcome.rows[0] else retained(row, outcome.rows[0])
    said = f"mean {row.score():.0%}" + ("" if kept is None else f", retained {kept:.0%}")
    panel.set_title(f"{row.recipe}\n{said}", fontsize=9.5)
    return image
