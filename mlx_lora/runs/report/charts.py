"""Charts as SVG for a page, drawn by matplotlib. Their colours are CSS variables, so they follow the page's theme.

matplotlib is imported when the first chart is drawn. pyplot is not used, and matplotlib's settings are restored.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from .history import Curve, clean

POINTS = 400  # points drawn of a curve; longer curves are drawn as means of groups of points
_SMOOTH_FROM = 60  # from this many points, a curve is drawn thin, with its moving mean on top
# Colours that matplotlib writes, and the CSS variable that replaces each.
_COLOURS = {"#0a0a0a": "var(--ink)", "#0b0b0b": "var(--muted)", "#0c0c0c": "var(--line)"}
_SERIES = {f"#0d0d{i:02x}": f"var(--series-{i})" for i in range(8)}
_INK, _MUTED, _LINE = _COLOURS
SERIES = list(_SERIES)


@dataclass(frozen=True)
class Line:
    """One curve of a chart. ``colour``: an index into ``SERIES``."""

    label: str
    curve: Curve
    colour: int = 0
    dashed: bool = False
    best: int | None = None  # iteration to mark


def draw(
    name: str,
    title: str,
    lines: Sequence[Line],
    size: tuple[float, float] = (4.6, 2.3),
    zero: bool = False,
    end: int | None = None,
) -> str:
    """The chart of ``lines`` as an ``<svg>`` element, ``size`` inches large.

    Args:
        name: makes the ids of the element unique in its page.
        zero: whether the vertical axis begins at 0.
        end: an iteration to mark with a vertical line.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context({**defaults, "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _frame(axes)
        for line in lines:
            _draw_line(axes, line)
        if end is not None:
            axes.axvline(end, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
        _scale(axes, lines, zero)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _as_element(out.getvalue(), name, title, _described(lines))


def thinned(curve: Curve, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values [n], n at most ``most``: means of neighbouring points; NaN if none is finite."""
    x = np.array(curve.iterations, float)
    y = np.array([math.nan if value is None else value for value in curve.values], float)
    if len(x) <= most:
        return x, y
    groups = np.array_split(np.arange(len(x)), most)
    means = [np.mean(y[g][np.isfinite(y[g])]) if np.isfinite(y[g]).any() else math.nan for g in groups]
    return np.array([x[g].mean() for g in groups]), np.array(means)


def smoothed(y: np.ndarray) -> np.ndarray:
    """The moving mean of ``y`` [n] over a tenth of its points; NaN is ignored."""
    width = max(3, len(y) // 10) | 1
    finite, kernel = np.isfinite(y), np.ones(width)
    sums = np.convolve(np.where(finite, y, 0), kernel, "same")
    counts = np.convolve(finite, kernel, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _noisy(y: np.ndarray) -> bool:
    """Whether the direction of ``y`` changes at every third point or more often."""
    steps = np.sign(np.diff(y[np.isfinite(y)]))
    return len(steps) > 1 and np.mean(steps[1:] * steps[:-1] < 0) > 1 / 3


def _frame(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, labelcolor=_MUTED, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _draw_line(axes, line: Line) -> None:
    x, y = thinned(line.curve)
    colour = SERIES[line.colour % len(SERIES)]
    style = dict(color=colour, linewidth=1.6, solid_capstyle="round", linestyle=(0, (4, 2)) if line.dashed else "-")
    if np.isfinite(y).sum() == 1 or (line.dashed and len(x) <= 30):
        style |= dict(marker="o", markersize=3.5)
    if len(x) >= _SMOOTH_FROM and not line.dashed and _noisy(y):
        axes.plot(x, y, **{**style, "linewidth": 0.8, "alpha": 0.3})
        y = smoothed(y)
    axes.plot(x, y, **style)
    if line.best in line.curve.iterations:
        value = line.curve.values[line.curve.iterations.index(line.best)]
        if value is not None:
            axes.plot([line.best], [value], "o", color=colour, markersize=7, markeredgewidth=1.6, fillstyle="none")


def _scale(axes, lines: Sequence[Line], zero: bool) -> None:
    """The vertical axis: from 0 if ``zero``; logarithmic if the values differ by more than a factor of 100."""
    values = [value for line in lines for value in line.curve.values if value is not None]
    largest = max((abs(value) for value in values), default=0)
    if zero:
        axes.set_ylim(0, 1.08 * largest or 1)
    elif values and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.tick_params(which="minor", length=0)
        return
    elif values and max(values) == min(values):
        top = 2 * largest or 1
        axes.set_ylim(-top if values[0] < 0 else -0.04 * top, 0.04 * top if values[0] < 0 else top)
    if largest and largest < 0.01:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    elif largest >= 1000:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _described(lines: Sequence[Line]) -> str:
    """The curves in words, for screen readers."""
    parts = []
    for line in lines:
        values = [value for value in line.curve.values if value is not None]
        if values:
            span = f"from {values[0]:.4g} to {values[-1]:.4g}, lowest {min(values):.4g}, highest {max(values):.4g}"
            parts.append(f"{line.label}: {len(values)} points over iterations {line.curve.iterations[0]:,} to ")
            parts[-1] += f"{line.curve.iterations[-1]:,}, {span}"
    return "; ".join(parts) or "no finite values"


def _as_element(text: str, name: str, title: str, described: str) -> str:
    """matplotlib's file as an element of a page: no prolog, unique ids, CSS variables as colours."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'(url\(#|xlink:href="#|href="#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    text = re.sub(r"font: [^;\"]*?([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's
    for colour, variable in {**_COLOURS, **_SERIES}.items():
        text = text.replace(colour, variable)
    view = re.search(r'viewBox="([^"]+)"', text)[1]
    title, described = (escape(clean(words)) for words in (title, described))
    head = (
        f'<svg viewBox="{view}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{title}</title><desc id="{name}-desc">{described}</desc>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
