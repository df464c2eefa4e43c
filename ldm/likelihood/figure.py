"""The two-stage bound as a picture: its terms on the way to the total, and the KL of every layer of the chain."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ldm.likelihood.two_stage import Terms

INK, CHAIN, SHARE, CREDIT = "#333333", "#2f6fb0", "#c9782c", "#4b9b63"


def plot_likelihood(columns: dict[str, Terms], title: str) -> Figure:
    """The terms of each bound on the way to its total, and the KL of every layer of the chain over t."""
    layered = "chain" in columns
    figure = Figure(figsize=(13 if layered else 6.8, 1.7 + 2 * len(columns)), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2 if layered else 1, squeeze=False)[0]
    if layered:
        _plot_layers(axes[0], columns["chain"])
    _plot_terms(axes[-1], columns)
    figure.suptitle(title, fontsize=11)
    return figure


def _plot_layers(axes: Any, chain: Terms) -> None:
    """The mean KL of a layer in each stratum of t, and what share of the sum the layers from t up have."""
    bound = chain.chain
    assert bound is not None
    inner = bound.steps > 1
    kl = chain.bits_per_dim(bound.curve)[inner].numpy()
    widths = bound.widths[inner].numpy()
    edges = 1.5 + np.concatenate([[0], widths.cumsum()])
    axes.stairs(kl, edges, baseline=None, color=CHAIN, lw=1.5)
    axes.set(xscale="log", yscale="log", xlim=(edges[0], edges[-1]), xlabel="t", ylabel="KL of one layer, bits/dim")
    axes.tick_params(axis="y", which="both", colors=CHAIN)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"L_t-1 for t = 2..{edges[-1] - 0.5:.0f}, averaged in {len(kl)} strata of t", fontsize=10)
    axes.grid(alpha=0.25)
    above = np.append(np.cumsum((kl * widths)[::-1])[::-1], 0.0)
    other = axes.twinx()
    other.plot(edges, above / above[0], color=SHARE, lw=1.5, ls="--")
    other.set(ylabel="share of the sum that t and above have", ylim=(0, 1.02))
    other.tick_params(colors=SHARE)


def _plot_terms(axes: Any, columns: dict[str, Terms]) -> None:
    """A waterfall per column of the table: each term starts where the one before it ended."""
    labels: list[str] = []
    for name, terms in columns.items():
        found = terms.metrics()
        values = np.array([found[key].value for key in terms.parts])
        ends, total = values.cumsum(), found["total"]
        starts, widths = [*(ends - values), 0.0], [*values, ends[-1]]
        colours = [*np.where(values < 0, CREDIT, CHAIN), INK]
        bars = axes.barh(len(labels) + np.arange(len(widths)), widths, left=starts, height=0.7, color=colours)
        said = [*(f"{value:+.3f}" for value in values), f"{total.value:.3f} ± {total.standard_error:.3f}"]
        axes.bar_label(bars, said, padding=3, fontsize=8)
        labels += [*terms.parts, f"{name}: total", ""]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel("bits/dim")
    axes.set_title("each term from where the last one ended; ± standard error between images", fontsize=10)
    axes.axvline(0, color=INK, lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
