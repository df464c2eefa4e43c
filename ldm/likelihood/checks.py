"""What a likelihood cannot be asked for, refused before anything is computed."""

from typing import Any, get_args

from ldm.autoencoder.autoencoder import Autoencoder, LatentStatistics
from ldm.diffusion.chain import VarianceType
from ldm.diffusion.continuous.clock import clock_ends
from ldm.diffusion.continuous.ode import check_tolerances
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.rules import Count, Number, checked
from ldm.sampling.pipeline import LatentDiffusionPipeline


def require_density(autoencoder: Autoencoder) -> LatentStatistics:
    """The measured scales of p(x | z_raw) and of z, of an autoencoder that defines q(z_raw | x) and p(x | z_raw).

    Raises:
        UserError: it defines none, or was not measured.
    """
    name, statistics = f"The autoencoder {type(autoencoder.model).__name__}", autoencoder.statistics
    if not autoencoder.has_density:
        raise UserError(
            f"{name} has no density over its latents, so images have no likelihood under it. Train one with a KL: "
            "python -m ldm.train stage=vae regulariser=kl"
        )
    if statistics is None:
        raise UserError(
            f"{name} was not measured on its training split: latents.json is missing beside its weights. Put that "
            "file back, or train the autoencoder again."
        )
    return statistics


def check_chain(pipeline: LatentDiffusionPipeline, variance: str, steps: Any, ode: dict[str, Any] | None) -> None:
    """Refuse what a pipeline's chain cannot answer, before anything is computed.

    Raises:
        UserError: naming the key, its value and the rule.
    """
    if not pipeline.autoencoder.is_identity:
        require_density(pipeline.autoencoder)
    schedule, known = pipeline.schedule, get_args(VarianceType)
    if variance not in known:
        raise UserError(f"variance={variance} is unknown. Choose one of: {', '.join(known)}.")
    if variance != "optimal":  # which may be fitted first
        pipeline.check_sigma(variance)
    if steps is not None and (type(steps) is not int or steps % 2 or not 4 <= steps <= schedule.num_steps):
        raise UserError(
            f"steps={steps} must be an even number from 4 to T = {schedule.num_steps}, or all for every t of the chain."
        )
    if ode is not None:
        _check_ode(schedule, **ode)


@checked
def _check_ode(schedule: NoiseSchedule, *, rtol: Number = 1e-4, atol: Number = 1e-4, probes: Count | None = 1) -> None:
    try:
        check_tolerances(rtol, atol)
        clock_ends(schedule, 1.0)
    except ValueError as error:
        raise UserError(f"The ODE has no density here: {error}. Change that, or leave ode= out.") from error
