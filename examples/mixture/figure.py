"""Plot the forward and reverse chains of a mixture: snapshots at several t, and the paths of individual samples."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from examples.mixture.mixture import Mixture, ReverseChain
from ldm.diffusion.schedule import NoiseSchedule

NUM_POINTS = 1500
"""Number of points in each scatter plot."""
NUM_BOUNCES = 50
"""Number of straight segments per path."""
TEXT_COLOUR = "#2b2b2b"
MODE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
"""Colours of the modes, from the colour-blind-safe palette of Okabe and Ito."""


def plot_chains(
    mixture: Mixture,
    schedule: NoiseSchedule,
    forward: dict[int, Tensor],
    initial_mode: Tensor,
    reverse: ReverseChain,
) -> Figure:
    """Plot snapshots of both chains at the same t, and the paths of the first coordinate along the reverse chain."""
    final_mode = mixture.most_likely_mode(schedule, reverse.z_0)
    figure = Figure(figsize=(14, 13), dpi=110, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06))
    rows = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 1, 2.6))[:, 0]
    _plot_snapshots(rows[0], "Forward chain, from left to right (colour: initial mode)", forward, initial_mode)
    title = "Reverse chain of the trained network, from right to left (colour: final mode)"
    _plot_snapshots(rows[1], title, reverse.snapshots, final_mode)
    _plot_plinko(rows[2], mixture, schedule, reverse, final_mode)
    return figure


def _plot_snapshots(figure: SubFigure, title: str, snapshots: dict[int, Tensor], mode: Tensor) -> None:
    figure.suptitle(title, fontsize=13, color=TEXT_COLOUR)
    panels = figure.subplots(1, len(snapshots), squeeze=False, sharey=True)[0]
    for axes, (t, z_t) in zip(panels, snapshots.items(), strict=True):
        colours = [MODE_COLOURS[k] for k in mode[:NUM_POINTS].tolist()]
        axes.scatter(*z_t[:NUM_POINTS].T.numpy(), s=4, c=colours, alpha=0.7, linewidths=0)
        axes.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xticks=(-2, 0, 2), yticks=(-2, 0, 2), aspect="equal")
        axes.set_title(f"t = {t}", fontsize=11, color=TEXT_COLOUR)
        _style(axes)


def _plot_plinko(
    figure: SubFigure, mixture: Mixture, schedule: NoiseSchedule, reverse: ReverseChain, final_mode: Tensor
) -> None:
    """Plot the first coordinate of individual samples from z_T (top) to z_0 (bottom), over the exact q(z_t) in grey."""
    title = f"Plinko: the first coordinate of {reverse.paths.shape[1]} samples, from noise down to the modes"
    figure.suptitle(title, fontsize=13, color=TEXT_COLOUR)
    board, bins = figure.subplots(2, 1, sharex=True, height_ratios=(1, 0.24))
    num_steps = schedule.num_steps
    # plot only a subset of the steps, because random walks with every step would cover the whole board
    step_indices = torch.linspace(0, len(reverse.times) - 1, NUM_BOUNCES + 1).round().long().unique()
    paths, heights = reverse.paths[step_indices, :, 0].T.numpy(), torch.tensor(reverse.times)[step_indices].numpy()
    x_max = max(3.5, 1.02 * abs(paths).max())
    x, rows = torch.linspace(-x_max, x_max, 400), torch.linspace(0, num_steps, 160).round().long().unique()
    projected = Mixture(mixture.means[:, :1], mixture.weights, mixture.variance)
    marginals = torch.stack([projected.log_density(schedule, x[:, None], int(t)).exp() for t in rows])
    mode_densities = projected.log_joint(schedule, x[:, None], 0).exp().T.numpy()

    density = (x.numpy(), rows.numpy(), (marginals / marginals.amax(1, keepdim=True)).numpy())
    board.pcolormesh(*density, cmap="Greys", vmax=2.4, shading="gouraud", zorder=0)
    for path, mode in zip(paths, final_mode.tolist(), strict=False):
        board.plot(path, heights, color=MODE_COLOURS[mode], linewidth=0.9, alpha=0.75)
        board.plot(path[0], heights[0], "o", color=MODE_COLOURS[mode], markersize=4, clip_on=False, zorder=3)
    board.set(ylim=(0, num_steps), ylabel="t")
    for k, density_k in enumerate(mode_densities):
        bins.fill_between(x.numpy(), density_k, color=MODE_COLOURS[k], alpha=0.9, linewidth=0)
        top = (projected.means[k, 0].item(), density_k.max())
        bins.annotate(f"mode {k + 1}", top, (0, 3), textcoords="offset points", ha="center", color=TEXT_COLOUR)
    bins.set(xlim=(-x_max, x_max), ylim=(0, 1.3 * mode_densities.max()))
    bins.set(xlabel="first coordinate of z_t", ylabel="q(z_t)\nt = 0")
    for axes in (board, bins):
        axes.yaxis.label.set(rotation=0, ha="right", va="center")
        _style(axes)
    bins.set_yticks(())


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=TEXT_COLOUR)
