"""Picture of an evaluation: per metric, the scores of each stem over the tracks."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from stemserve.evaluation.metrics import LABELS
from stemserve.evaluation.results import Evaluation, save_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_BOX_FROM: Final = 5  # tracks; the quartiles of fewer say nothing
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D00")


def save_plot(path: Path, evaluation: Evaluation, baseline: Evaluation | None = None) -> None:
    """Draw one panel per metric: a point per track, the median, and a box from five tracks on.

    Args:
        path: png, svg or pdf.
        evaluation: what is drawn.
        baseline: its medians are marked.

    Raises:
        OutputNotWritableError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    metrics, stems = evaluation.metrics, evaluation.stems
    width = max(1.9, 0.55 * len(stems) + 0.9)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width * len(metrics) + 0.4, 3.8), layout="constrained", dpi=150)
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            axes.set_title(f"{LABELS[metric]}, dB")
            axes.set_xticks(range(len(stems)), stems, rotation=45, ha="right")
            axes.set_xlim(-0.6, len(stems) - 0.4)
            axes.grid(axis="y", color="0.9")
            axes.set_axisbelow(True)
            for x, stem in enumerate(stems):
                _draw_stem(axes, x, evaluation, baseline, stem, metric)
        figure.suptitle(evaluation.title, x=0.005, ha="left", fontsize=10)
        marks: dict[str, Artist] = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            marks |= dict(zip(labels, handles, strict=True))
        if marks:
            figure.legend(
                handles=list(marks.values()),
                labels=list(marks),
                loc="outside lower center",
                ncols=len(marks),
                frameon=False,
            )
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix[1:].lower())
    save_bytes(path, picture.getvalue())


def _draw_stem(
    axes: Axes,
    x: int,
    evaluation: Evaluation,
    baseline: Evaluation | None,
    stem: str,
    metric: str,
) -> None:
    values = evaluation.values(stem, metric)
    finite = [value for value in values if math.isfinite(value)]
    colour = _COLOURS[x % len(_COLOURS)]
    if len(finite) >= _BOX_FROM:
        axes.boxplot(
            [finite], positions=[x], widths=0.6, showfliers=False, medianprops={"linewidth": 0},
            boxprops={"color": "0.5"}, whiskerprops={"color": "0.5"}, capprops={"color": "0.5"},
            manage_ticks=False,
        )  # fmt: skip
    # Spread in a fixed way: the same scores give the same picture.
    spread = 0.22 * np.sin(2.4 * np.arange(len(finite))) if len(finite) > 1 else np.zeros(1)
    if finite:
        axes.plot(
            x + spread, finite, "o", markersize=3.5, alpha=0.7, color=colour, markeredgewidth=0
        )
    else:
        said = "inf" if values else "not\nmeasured"
        axes.annotate(said, (x, 0.5), xycoords=("data", "axes fraction"), ha="center", color="0.4")
    middle = evaluation.median(stem, metric)
    if math.isfinite(middle):
        axes.plot(
            [x - 0.3, x + 0.3], [middle] * 2, "-", color="black", linewidth=1.8, label="median"
        )
    before = math.nan if baseline is None else baseline.median(stem, metric)
    if math.isfinite(before):
        axes.plot(
            [x - 0.42, x + 0.42], [before] * 2, "--", color="#D55E00", linewidth=1.3,
            label="median of the baseline",
        )  # fmt: skip
