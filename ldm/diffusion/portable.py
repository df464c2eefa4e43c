"""Parts of the reverse chain that exported pipelines also use.

Every pipeline folder contains a copy of this module (see `ldm.sampling.diffusers_pipeline`), so it imports only torch.
"""

from torch import Tensor


def trailing_steps(num_steps: int, steps: int) -> list[int]:
    """Return round(T i / steps) for i = steps..0: the steps that a sampler visits, from T down to 0.

    Source: Lin et al. 2024, arXiv:2305.08891, table 2.
    """
    return [round(num_steps * i / steps) for i in range(steps, -1, -1)]


def output_to_z_0(output: Tensor, z_t: Tensor, a_t: Tensor, prediction: str) -> Tensor:
    """Convert a network's output at z_t to the clean latent that it implies.

        eps: (z_t - sigma eps) / alpha        z_0: z_0
        v: alpha z_t - sigma v                flow: (z_t - sigma u) / (alpha + sigma)

    where eps, z_0, v or u is the network's output, alpha = sqrt(a_t) and sigma = sqrt(1 - a_t).

    Args:
        output: [b, C, h, w], like z_t.
        a_t: alpha_bar at t in float64, broadcastable to z_t.
    """
    alpha, sigma = a_t.sqrt().to(z_t), (1 - a_t).sqrt().to(z_t)
    if prediction == "z_0":
        return output
    if prediction == "eps":
        return (z_t - sigma * output) / alpha
    if prediction == "v":
        return alpha * z_t - sigma * output
    return (z_t - sigma * output) / (alpha + sigma)
