"""Speed-up and efficiency over ranks, as a picture."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from leanserve.loadtest.plots import BLUE, MUTED, ORANGE, STYLE, TEAL

__all__ = ["plot_scaling"]


def plot_scaling(speed_ups: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Write a PNG. speed_ups: by what is compared, then by rank count."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        speed, efficiency = figure.subplots(1, 2)
        for (name, by_ranks), colour in zip(speed_ups.items(), (BLUE, ORANGE, TEAL), strict=True):
            ranks = list(by_ranks)
            speed.plot(ranks, list(by_ranks.values()), marker="o", color=colour, label=name)
            shares = [up * ranks[0] / count for count, up in by_ranks.items()]
            efficiency.plot(ranks, shares, marker="o", color=colour, label=name)
        ranks = list(next(iter(speed_ups.values())))
        speed.plot(ranks, [count / ranks[0] for count in ranks], ":", color=MUTED, label="linear")
        efficiency.axhline(1, linestyle=":", color=MUTED)
        speed.set(title="speed-up", ylim=(0, None))
        efficiency.set(title="efficiency", ylim=(0, None))
        efficiency.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in (speed, efficiency):
            axes.set(xlabel="ranks", xticks=ranks)
        speed.legend(fontsize=8)
        figure.savefig(path, dpi=140)
