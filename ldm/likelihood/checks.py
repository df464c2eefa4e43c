"""Checks of the likelihood options, which run before any computation."""

from typing import Any, get_args

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics
from ldm.diffusion.chain import VarianceType
from ldm.diffusion.continuous.clock import clock_ends
from ldm.diffusion.continuous.ode import check_tolerances
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.rules import Count, Number, checked
from ldm.sampling.pipeline import LatentDiffusion


def require_density(autoencoder: Autoencoder) -> LatentStatistics:
    """Return the latent statistics of an autoencoder, which must define a density.

    Raises:
        UserError: if the autoencoder does not define q(z_raw | x) and p(x | z_raw), or its statistics are missing.
    """
    name, statistics = f"The autoencoder {type(autoencoder.model).__name__}", autoencoder.statistics
    if not autoencoder.has_density:
        raise UserError(
            f"{name} has no density over its latents, so it cannot assign a likelihood to images. Train an autoencoder "
            "with a KL term: python -m ldm.train stage=vae regulariser=kl"
        )
    if statistics is None:
        raise UserError(
            f"{name} has no latent statistics: latents.json is missing next to its weights. Restore "
            "that file, or retrain the autoencoder."
        )
    return statistics


def check_chain(pipeline: LatentDiffusion, variance: str, steps: Any, ode: dict[str, Any] | None) -> None:
    """Check that the bound can be computed with these options.

    Raises:
        UserError: if an option is invalid.
    """
    if not pipeline.autoencoder.is_identity:
        require_density(pipeline.autoencoder)
    schedule, choices = pipeline.schedule, get_args(VarianceType)
    if variance not in choices:
        raise UserError(f"variance={variance} is unknown. Choose one of: {', '.join(choices)}.")
    if variance != "optimal":  # the optimal variance can be fitted later
        pipeline.check_variance(variance)
    if steps is not None and (type(steps) is not int or steps % 2 or not 4 <= steps <= schedule.num_steps):
        raise UserError(
            f"steps={steps} must be an even number from 4 to T = {schedule.num_steps}, or 'all' to use every t."
        )
    if ode is not None:
        _check_ode(schedule, **ode)


@checked
def _check_ode(schedule: NoiseSchedule, *, rtol: Number = 1e-4, atol: Number = 1e-4, probes: Count | None = 1) -> None:
    try:
        check_tolerances(rtol, atol)
        clock_ends(schedule, 1.0)
    except ValueError as error:
        raise UserError(
            f"The likelihood under the ODE cannot be computed: {error}. Correct this, or remove ode=."
        ) from error
