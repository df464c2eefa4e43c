"""The two-stage bound as a picture: its terms on the way to the total, and the KL of every layer of the chain."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ldm.likelihood.two_stage import Terms

INK, CHAIN, SHARE, CREDIT = "#333333", "#2f6fb0", "#c9782c", "#4b9b63"


def plot_likelihood(columns: dict[str, Terms], title: str) -> Figure:
    """The terms of each bound on the way to its total, and the KL of every layer of the chain over t."""
    chain = columns.get("chain")
    layered = chain is not None and chain.chain is not None and len(chain.chain.steps) > 1
    rows = sum(len(terms.parts) + 2 for terms in columns.values())
    figure = Figure(figsize=(13 if layered else 6.8, max(3.2, 1.2 + 0.27 * rows)), layout="constrained")
    axes = figure.subplots(1, 2 if layered else 1, squeeze=False)[0]
    if chain is not None and layered:
        _plot_layers(axes[0], chain)
    _plot_terms(axes[-1], columns)
    what = "the chain is a hierarchical VAE with a layer for every t" if layered else "the bound"
    figure.suptitle(f"{title}: {what}", fontsize=11)
    return figure


def _plot_layers(axes: Any, chain: Terms) -> None:
    """The mean KL of a layer in each stratum of t, and what share of the sum the layers from t up have."""
    bound = chain.chain
    assert bound is not None
    inner = bound.steps > 1
    kl = chain.bits_per_dim(bound.curve)[inner].numpy()
    widths = bound.widths[inner].numpy()
    edges = 1.5 + np.concatenate([[0], widths.cumsum()])
    every_t = len(kl) == widths.sum()
    axes.stairs(kl, edges, baseline=None, color=CHAIN, lw=1.5)
    if not every_t:
        axes.plot(np.sqrt(edges[1:] * edges[:-1]), kl, ".", color=CHAIN, ms=5)
    axes.set(xscale="log", yscale="log", xlim=(edges[0], edges[-1]), xlabel="t", ylabel="KL of one layer, bits/dim")
    axes.yaxis.label.set_color(CHAIN)
    axes.tick_params(axis="y", which="both", colors=CHAIN)
    axes.xaxis.set_major_formatter("{x:g}")
    of = "each t" if every_t else f"averaged in {len(kl)} strat{'um' if len(kl) == 1 else 'a'} of t"
    axes.set_title(f"L_t-1 for t = 2..{edges[-1] - 0.5:.0f}, {of}", fontsize=10)
    axes.grid(alpha=0.25)
    above = np.append(np.cumsum((kl * widths)[::-1])[::-1], 0.0)
    other = axes.twinx()
    other.plot(edges, above / above[0], color=SHARE, lw=1.5, ls="--")
    other.set_ylabel("share of the sum that t and above have", color=SHARE)
    other.set_ylim(0, 1.02)
    other.tick_params(colors=SHARE)


def _plot_terms(axes: Any, columns: dict[str, Terms]) -> None:
    """A waterfall per column of the table: each term starts where the one before it ended."""
    labels: list[str] = []
    reached = [0.0]
    for name, terms in columns.items():
        found, end = {name: metric.value for name, metric in terms.metrics().items()}, 0.0
        for key in terms.parts:
            axes.barh(len(labels), found[key], left=end, height=0.7, color=CREDIT if found[key] < 0 else CHAIN)
            at = max(end, end + found[key])
            axes.text(at, len(labels), f" {found[key]:+.3f}", va="center", fontsize=8, color=INK)
            end += found[key]
            reached.append(end)
            labels.append(key)
        axes.barh(len(labels), end, height=0.7, color=INK)
        text = f" {end:.3f} ± {terms.metrics()['total'].standard_error:.3f}"
        axes.text(max(end, 0.0), len(labels), text, va="center", fontsize=8, weight="bold")
        labels += [f"{name}: total", ""]
    axes.set_yticks([y for y, label in enumerate(labels) if label], [label for label in labels if label], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 1.2, -0.7)
    span = max(reached) - min(reached)
    axes.set_xlim(min(reached) - 0.02 * span, max(reached) + 0.22 * span)
    axes.set(xlabel="bits/dim")
    axes.set_title("each term from where the last one ended; ± standard error between images", fontsize=10)
    axes.axvline(0, color=INK, lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
