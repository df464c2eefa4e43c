"""Figure of the two-stage bound: a waterfall chart of its terms, and the KL term at every t."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ldm.likelihood.two_stage import Terms

INK, BLUE, ORANGE, GREEN = "#333333", "#2f6fb0", "#c9782c", "#4b9b63"


def plot_likelihood(columns: dict[str, Terms], title: str) -> Figure:
    """Plot the terms of each bound as a waterfall chart and, if there is a chain, the chain's KL term at every t."""
    has_chain = "chain" in columns
    figure = Figure(figsize=(13 if has_chain else 6.8, 1.7 + 2 * len(columns)), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2 if has_chain else 1, squeeze=False)[0]
    if has_chain:
        _plot_kl_terms(axes[0], columns["chain"])
    _plot_terms(axes[-1], columns)
    figure.suptitle(title, fontsize=11)
    return figure


def _plot_kl_terms(axes: Any, chain: Terms) -> None:
    """Plot the mean KL term in each stratum of t, and the cumulative share of the total KL from T down to t."""
    bound = chain.chain
    assert bound is not None
    is_kl_term = bound.steps > 1
    kl = chain.bits_per_dim(bound.curve)[is_kl_term].numpy()
    widths = bound.widths[is_kl_term].numpy()
    edges = 1.5 + np.concatenate([[0], widths.cumsum()])
    axes.stairs(kl, edges, baseline=None, color=BLUE, lw=1.5)
    axes.set(xscale="log", yscale="log", xlim=(edges[0], edges[-1]), xlabel="t", ylabel="KL term per t, bits/dim")
    axes.tick_params(axis="y", which="both", colors=BLUE)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"L_t-1 for t = 2..{edges[-1] - 0.5:.0f}, averaged within {len(kl)} strata of t", fontsize=10)
    axes.grid(alpha=0.25)
    cumulative = np.append(np.cumsum((kl * widths)[::-1])[::-1], 0.0)
    share_axes = axes.twinx()
    share_axes.plot(edges, cumulative / cumulative[0], color=ORANGE, lw=1.5, ls="--")
    share_axes.set(ylabel="cumulative share of the total KL, from T down to t", ylim=(0, 1.02))
    share_axes.tick_params(colors=ORANGE)


def _plot_terms(axes: Any, columns: dict[str, Terms]) -> None:
    """Plot a waterfall chart for each column of the table. Each bar starts where the previous bar ends."""
    labels: list[str] = []
    for name, terms in columns.items():
        metrics = terms.metrics()
        values = np.array([metrics[key].value for key in terms.parts])
        ends, total = values.cumsum(), metrics["total"]
        starts, widths = [*(ends - values), 0.0], [*values, ends[-1]]
        colours = [*np.where(values < 0, GREEN, BLUE), INK]
        bars = axes.barh(len(labels) + np.arange(len(widths)), widths, left=starts, height=0.7, color=colours)
        bar_labels = [*(f"{value:+.3f}" for value in values), f"{total.value:.3f} ± {total.standard_error:.3f}"]
        axes.bar_label(bars, bar_labels, padding=3, fontsize=8)
        labels += [*terms.parts, f"{name}: total", ""]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel("bits/dim")
    axes.set_title("Terms of each bound (± standard error over images)", fontsize=10)
    axes.axvline(0, color=INK, lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
