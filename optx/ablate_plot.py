"""The Pareto plot of an ablation: KL against bits a weight or bytes a token, both axes logarithmic, every point labelled."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optx.ablate_table import AXES, UNCOMPILED, Outcome, Result, front
from optx.ir import size_text

FLOOR = 1e-6  # nats: below it the KL is rounding of float32 sums, and is drawn here
NAMED = 12  # points up to which all have their names beside them; else those off the front have numbers, and a list
SIZE, LIST, LETTER = (8.4, 5.6), 2.2, 0.058  # inches: of the figure, what the list adds to its width at least, a letter
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, told apart by all eyes
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#5a5a5a"
LABEL, NEAR = 8, 12  # points: of the labels' type; distance from which a line ties a label to its point
TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8)  # of an axis, times powers of ten
Place = tuple[
    float, float, str, str
]  # of a label: (dx, dy) in points from its point, horizontal and vertical alignment
PLACES: tuple[Place, ...] = (  # the best first: a front leaves its point to the right and reaches it from above
    *((6, 3, "left", "bottom"), (-6, -3, "right", "top"), (7, 0, "left", "center"), (-7, 0, "right", "center")),
    *((-6, 3, "right", "bottom"), (6, -3, "left", "top"), (0, 8, "center", "bottom"), (0, -8, "center", "top")),
    *((12, 15, "left", "bottom"), (-12, 15, "right", "bottom"), (12, -15, "left", "top"), (-12, -15, "right", "top")),
    *((20, 28, "left", "bottom"), (-20, 28, "right", "bottom"), (20, -28, "left", "top"), (-20, -28, "right", "top")),
)


def draw(outcome: Outcome, path: Path) -> bool:
    """Writes a PNG. False, and nothing written, where no variant has a KL.

    A colour a model; a marker for each size of the cache, where they are few and not the axis; filled on the Pareto front,
    hollow off it.
    """
    of = AXES[outcome.x][1]
    points = [r for r in outcome.results if r.variant != UNCOMPILED and r.kl is not None and of(r) is not None]
    if not points:
        return False
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = front(outcome.results, outcome.x)
    listed = [] if len(points) <= NAMED else [r for r in points if r not in best]
    names = _names(listed)
    more = max(LIST, LETTER * max(map(len, names), default=0))
    width = SIZE[0] + (more if listed else 0)
    with matplotlib.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, SIZE[1]), dpi=200, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        axes, column = figure.subplots(1, 2, width_ratios=(SIZE[0], more)) if listed else (figure.subplots(), None)
        _points(axes, outcome, points, best)
        _frame(axes, outcome, points)
        labels = {id(r): r.variant for r in points} | {id(r): f"{i}" for i, r in enumerate(listed, 1)}
        if listed:
            _list(column, names)
        canvas.draw()  # lays the axes out, so that points have pixels
        figure.set_layout_engine("none")
        first = sorted(points, key=lambda r: r not in best)
        colours = _colours(points)
        ink = colours if len(colours) > 1 else dict.fromkeys(colours, "black")
        _labels(figure, axes, [(of(r), max(r.kl, FLOOR), labels[id(r)], ink[r.model]) for r in first])
        canvas.print_png(path)
    return True


def _colours(points: Sequence[Result]) -> dict[str, str]:
    models = list(dict.fromkeys(r.model for r in points))
    return dict(zip(models, COLOURS * len(models)))


def _points(axes, outcome: Outcome, points: Sequence[Result], best: Sequence[Result]) -> None:
    of, colours = AXES[outcome.x][1], _colours(points)
    caches = sorted({r.kv_bytes_per_token for r in points}, reverse=True)
    kinds = MARKERS if outcome.x != "kv_bytes_per_token" and len(caches) <= len(MARKERS) else MARKERS[:1]
    markers = dict(zip(caches, kinds * len(caches)))
    for r in points:
        colour, on = colours[r.model], r in best
        axes.plot(
            of(r), max(r.kl, FLOOR), markers[r.kv_bytes_per_token], color=colour, markersize=7.5 if on else 6,
            markerfacecolor=colour if on else "white", markeredgewidth=1.3, zorder=4 if on else 3,
        )  # fmt: skip
    for model, colour in colours.items():
        line = [(of(r), max(r.kl, FLOOR)) for r in best if r.model == model]
        axes.step(*zip(*line), where="post", color=colour, linewidth=1.2, alpha=0.7, zorder=2)
    handles = _legend(colours, markers)
    axes.legend(handles=handles, loc="best", frameon=True, framealpha=0.9, edgecolor="#cccccc", fontsize=8.5)


def _legend(colours: Mapping[str, str], markers: Mapping[float, str]) -> list:
    """The front; models and caches where there are several."""
    from matplotlib.lines import Line2D

    drawn = {"linestyle": "none", "markersize": 6.5, "markeredgewidth": 1.3}
    handles = [Line2D([], [], color=GREY, marker="o", linewidth=1.2, markersize=7, label="Pareto front, filled")]
    if len(colours) > 1:
        handles += [Line2D([], [], color=colour, marker="o", label=name, **drawn) for name, colour in colours.items()]
    if len(set(markers.values())) > 1:
        handles += [
            Line2D([], [], color=GREY, marker=m, markerfacecolor="white", label=f"KV {cache:,.0f} B a token", **drawn)
            for cache, m in markers.items()
        ]
    return handles


def _frame(axes, outcome: Outcome, points: Sequence[Result]) -> None:
    """Axes, grid, title; the uncompiled models, which have no place on a logarithmic axis, as text."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    label, of = AXES[outcome.x]
    xs, ys = [of(r) for r in points], [max(r.kl, FLOOR) for r in points]
    room = max((max(xs) / min(xs)) ** 0.08, 1.1)
    if outcome.x in ("bytes_per_token", "ms_bound"):
        label += f" and {outcome.protocol['decode_context']:,} tokens"
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="KL against the uncompiled model, nats a token")
    axes.set_xlim(min(xs) / room, max(xs) * room**1.8)
    axes.set_ylim(min(ys) / 1.8, max(ys) * 2.2)
    axes.xaxis.set_major_locator(LogLocator(subs=TICKS, numticks=30))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _value(x, outcome.x)))
    axes.grid(True, which="major", color="#d9d9d9", linewidth=0.7)
    axes.grid(True, which="minor", axis="y", color="#ececec", linewidth=0.5)
    axes.set_axisbelow(True)
    dense = [r for r in outcome.results if r.variant == UNCOMPILED]
    said = "; ".join(f"{r.model} uncompiled: {_value(of(r), outcome.x)}, perplexity {r.perplexity:.3f}" for r in dense)
    floor = f"; a KL below {FLOOR:g} is drawn there" if any(r.kl < FLOOR for r in points) else ""
    axes.set_title(outcome.name, loc="left", fontweight="bold", pad=22)
    axes.text(0, 1.02, f"{said}{floor}", transform=axes.transAxes, color=GREY, fontsize=8.5, va="bottom")


def _value(x: float | None, axis: str) -> str:
    if x is None:
        return "-"
    if axis == "kv_bytes_per_token":
        return f"{x:,.0f} B"
    if axis == "bytes_per_token":
        return size_text(x).replace(".0 ", " ")
    return f"{x:.3g} bits" if axis.endswith("bits") else f"{x:.3g} ms"


def _names(listed: Sequence[Result]) -> list[str]:
    several = len({r.model for r in listed}) > 1
    return [f"{r.variant}, {r.model}" if several else r.variant for r in listed]


def _list(column, names: Sequence[str]) -> None:
    """What the numbers of points off the front stand for."""
    column.axis("off")
    lines = [f"{i:>2}  {name}" for i, name in enumerate(names, 1)]
    size = min(LABEL, 72 * SIZE[1] * 0.85 / (1.3 * len(lines)))
    column.text(0, 1, "\n".join(lines), transform=column.transAxes, fontsize=size, va="top", linespacing=1.3)


def _labels(figure, axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each label (x, y, text, colour) at the place of PLACES where it covers least of points, labels and legend; a far one
    gets a line."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    spots = [axes.transData.transform(point[:2]) for point in points]
    marks = [Bbox.from_extents(x - 4 * pixels, y - 4 * pixels, x + 4 * pixels, y + 4 * pixels) for x, y in spots]
    page, taken = axes.get_window_extent(renderer), [axes.get_legend().get_window_extent(renderer)]
    for i, (x, y, name, colour) in enumerate(points):
        probe = axes.text(0, 0, name, fontsize=LABEL)
        width, height = probe.get_window_extent(renderer).size
        probe.remove()

        def box(place: Place, i=i, width=width, height=height) -> Bbox:
            dx, dy, across, up = place
            left = spots[i][0] + dx * pixels - {"left": 0, "center": width / 2, "right": width}[across]
            low = spots[i][1] + dy * pixels - {"bottom": 0, "center": height / 2, "top": height}[up]
            return Bbox.from_bounds(left, low, width, height)

        others = [*taken, *(mark for j, mark in enumerate(marks) if j != i)]
        place = min(PLACES, key=lambda place: _covered(box(place), others, page))
        dx, dy, across, up = place
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if math.hypot(dx, dy) > NEAR else None
        axes.annotate(
            name, (x, y), (dx, dy), textcoords="offset points", ha=across, va=up, fontsize=LABEL, arrowprops=line,
            color=colour, path_effects=[withStroke(linewidth=2, foreground="white")], zorder=5,
        )  # fmt: skip
        taken.append(box(place))


def _covered(box, others: Sequence, page) -> float:
    """Area of the others under a label, in pixels; what leaves the page counts most."""
    from matplotlib.transforms import Bbox

    both = [found for other in others if (found := Bbox.intersection(box, other)) is not None]
    inside = Bbox.intersection(box, page)
    outside = box.width * box.height - (0 if inside is None else inside.width * inside.height)
    return sum(found.width * found.height for found in both) + 10 * max(outside, 0)
