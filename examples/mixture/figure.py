"""A mixture through both chains as a picture: points at chosen t, and their ways down."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from examples.mixture.mixture import Descent, Mixture
from ldm.diffusion.schedule import NoiseSchedule

POINTS = 1500
"""How many points a picture of a chain shows."""
BOUNCES = 50
"""At how many t a way down is drawn."""
INK = "#2b2b2b"
MODE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
"""Okabe and Ito's, which colour-blind readers can tell apart."""


def draw(
    mixture: Mixture,
    schedule: NoiseSchedule,
    forward: dict[int, Tensor],
    origin: Tensor,
    descent: Descent,
) -> Figure:
    """Both chains at the same t, and the first coordinate all the way down."""
    end = mixture.mode_of(schedule, descent.z_0)
    figure = Figure(figsize=(14, 13), dpi=110, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06))
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=(1, 1, 2.6))[:, 0]
    _frames(parts[0], "Forward chain, left to right. Colour: the mode that a point comes from", forward, origin)
    title = "Reverse chain of the trained network, right to left. Colour: the mode that a point ends in"
    _frames(parts[1], title, descent.frames, end)
    _plinko(parts[2], mixture, schedule, descent, end)
    return figure


def _frames(figure: SubFigure, title: str, frames: dict[int, Tensor], mode: Tensor) -> None:
    figure.suptitle(title, fontsize=13, color=INK)
    every = figure.subplots(1, len(frames), squeeze=False, sharey=True)[0]
    for axes, (t, z_t) in zip(every, frames.items(), strict=True):
        colours = [MODE_COLOURS[k] for k in mode[:POINTS].tolist()]
        axes.scatter(*z_t[:POINTS].T.numpy(), s=4, c=colours, alpha=0.7, linewidths=0)
        axes.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xticks=(-2, 0, 2), yticks=(-2, 0, 2), aspect="equal")
        axes.set_title(f"t = {t}", fontsize=11, color=INK)
        _plain(axes)


def _plinko(figure: SubFigure, mixture: Mixture, schedule: NoiseSchedule, descent: Descent, end: Tensor) -> None:
    """The first coordinate of some points from z_T, at the top, down into the modes, on the exact q(z_t) in grey."""
    title = f"Plinko: the first coordinate of {descent.paths.shape[1]} points, from noise down into the modes"
    figure.suptitle(title, fontsize=13, color=INK)
    way, piles = figure.subplots(2, 1, sharex=True, height_ratios=(1, 0.24))
    num_steps = schedule.num_steps
    # One bounce in so many steps: every step of a random walk would paint the board over.
    shown = torch.linspace(0, len(descent.steps) - 1, BOUNCES + 1).round().long().unique()
    paths, heights = descent.paths[shown, :, 0].T.numpy(), torch.tensor(descent.steps)[shown].numpy()
    reach = max(3.5, 1.02 * abs(paths).max())
    x, rows = torch.linspace(-reach, reach, 400), torch.linspace(0, num_steps, 160).round().long().unique()
    first = Mixture(mixture.means[:, :1], mixture.weights, mixture.variance)
    marginals = torch.stack([first.log_density(schedule, x[:, None], int(t)).exp() for t in rows])
    modes = first.log_joint(schedule, x[:, None], 0).exp().T.numpy()

    board = (x.numpy(), rows.numpy(), (marginals / marginals.amax(1, keepdim=True)).numpy())
    way.pcolormesh(*board, cmap="Greys", vmax=2.4, shading="gouraud", zorder=0)
    for path, mode in zip(paths, end.tolist(), strict=False):
        way.plot(path, heights, color=MODE_COLOURS[mode], linewidth=0.9, alpha=0.75)
        way.plot(path[0], heights[0], "o", color=MODE_COLOURS[mode], markersize=4, clip_on=False, zorder=3)
    way.set(ylim=(0, num_steps), ylabel="t")
    for k, pile in enumerate(modes):
        piles.fill_between(x.numpy(), pile, color=MODE_COLOURS[k], alpha=0.9, linewidth=0)
        top = (first.means[k, 0].item(), pile.max())
        piles.annotate(f"mode {k + 1}", top, (0, 3), textcoords="offset points", ha="center", color=INK)
    piles.set(xlim=(-reach, reach), ylim=(0, 1.3 * modes.max()))
    piles.set(xlabel="first coordinate of z_t", ylabel="q(z_t)\nt = 0")
    for axes in (way, piles):
        axes.yaxis.label.set(rotation=0, ha="right", va="center")
        _plain(axes)
    piles.set_yticks(())


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
