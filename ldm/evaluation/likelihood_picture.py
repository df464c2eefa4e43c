"""The two-stage bound as a picture: its terms on the way to the total, and the KL of every layer of the chain."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ldm.evaluation.likelihood import Terms

INK, CHAIN, SHARE, CREDIT = "#333333", "#2f6fb0", "#c9782c", "#4b9b63"


def draw(columns: dict[str, Terms], title: str) -> Figure:
    """The terms of each bound on the way to its total, and the KL of every layer of the chain over t."""
    chain = columns.get("chain")
    figure = Figure(figsize=(12, 4.6) if chain else (6.4, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if chain else 1, squeeze=False)[0]
    if chain is not None and chain.chain is not None:
        _draw_layers(axes[0], chain)
    _draw_terms(axes[-1], columns)
    what = "a layer of the hierarchical VAE for every t" if chain else "the autoencoder's own bound"
    figure.suptitle(f"{title}: {what}", fontsize=11)
    return figure


def _draw_layers(axes: Any, chain: Terms) -> None:
    bound = chain.chain
    assert bound is not None
    kl = chain.bits_per_dim(bound.curve).numpy()
    t, num_steps = bound.steps.numpy(), int(bound.widths.sum())
    inner = t > 1
    axes.plot(t[inner], kl[inner], color=CHAIN, lw=1.5)
    axes.set(xscale="log", yscale="log", xlim=(1.5, num_steps * 1.05), xlabel="t", ylabel="KL of the layer, bits/dim")
    axes.set_title(f"L_t-1 for t = 2..{num_steps}", fontsize=10)
    axes.grid(alpha=0.25)
    shares = np.cumsum((kl * bound.widths.numpy())[inner][::-1])[::-1]
    other = axes.twinx()
    other.plot(t[inner], shares / shares[0], color=SHARE, lw=1.5, ls="--")
    other.set_ylabel("share of the sum that t and above have", color=SHARE)
    other.set_ylim(0, 1.02)
    other.tick_params(colors=SHARE)


def _draw_terms(axes: Any, columns: dict[str, Terms]) -> None:
    """A waterfall per column of the table: each term starts where the one before it ended."""
    labels: list[str] = []
    for name, terms in columns.items():
        found, end = terms.figures(), 0.0
        for key in terms.parts:
            axes.barh(len(labels), found[key], left=end, height=0.7, color=CREDIT if found[key] < 0 else CHAIN)
            at = max(end, end + found[key])
            axes.text(at, len(labels), f" {found[key]:+.3f}", va="center", fontsize=8, color=INK)
            end += found[key]
            labels.append(key)
        axes.barh(len(labels), end, height=0.7, color=INK)
        axes.text(
            end, len(labels), f" {end:.3f} ± {found['standard_error']:.3f}", va="center", fontsize=8, weight="bold"
        )
        labels += [f"{name}: total", ""]
    axes.set_yticks([y for y, label in enumerate(labels) if label], [label for label in labels if label], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set(xlabel="bits/dim")
    axes.set_title("the terms of the bound, each from where the last one ended; ± between images", fontsize=10)
    axes.axvline(0, color=INK, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
