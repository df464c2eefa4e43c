"""The discriminator of stage 1, with its optimizer, start step and loss weight.

The discriminator is deliberately not part of the LightningModule, because Lightning counts the steps of every optimizer
and DDP waits for the gradient of every parameter. The trainer therefore only sees the generator, `max_steps` counts
generator steps, and the discriminator takes a step after each generator step. `Adversary` averages the discriminator's
gradients over ranks.
"""

from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from ldm.autoencoder.discriminator import GanLoss, PatchDiscriminator, discriminator_loss, generator_loss
from ldm.errors import InputError, UserError
from ldm.rules import Depth, Integer, NonNegative, Size, checked
from ldm.training.callbacks.guard import Guard


class Adversary:
    """A patch discriminator with its own Adam optimizer.

    Args:
        loss: "hinge" or "non_saturating".
        weight: Weight of the adversarial loss, multiplied by the adaptive weight lambda and the ramp.
        start: Generator step at which the discriminator starts to train. A value below 1 is a fraction of the budget.
        ramp: Number of generator steps over which the weight grows from 0, to give the discriminator a head start.
        lr: Peak learning rate of the discriminator, which decays like that of the generator.
        max_weight: Upper bound of lambda.
        channels, layers: Arguments of PatchDiscriminator.

    Raises:
        InputError: An argument is out of range.
    """

    @checked
    def __init__(
        self,
        loss: Annotated[GanLoss, Field()] = "hinge",
        *,
        weight: NonNegative = 0.1,
        start: NonNegative = 0.5,
        ramp: Annotated[Integer, Field(ge=0)] = 200,
        lr: NonNegative = 5e-4,
        max_weight: NonNegative = 1e4,
        channels: Size = 32,
        layers: Annotated[Depth, Field(le=64)] = 3,
    ) -> None:
        if start >= 1 and start != int(start):
            raise InputError("start", start, "must be an integer step, or a fraction of the budget below 1")
        self.shape = [channels, layers]
        self.gan_loss, self.weight, self.start, self.ramp, self.lr = loss, weight, start, ramp, lr
        self.max_weight = max_weight
        self.discriminator: nn.Module = PatchDiscriminator(channels, layers)
        # with fused=True, `found_inf` can skip a step without synchronising
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
        self.start_step: int | None = None
        """Generator step at which the discriminator started to train, or None if it has not started."""
        self.loss_scale = 1.0
        """Factor applied to the loss: 1 / number of accumulated micro-batches."""
        self.adaptive_weight: Any = None
        """Computes lambda from the gradients at the autoencoder's last layer. Set by `VAETraining`."""

    def check(self, resolution: int) -> None:
        """Check that the images are large enough for the discriminator.

        Raises:
            UserError: The images are too small. The message gives the maximum number of layers.
        """
        layers = self.shape[1]
        if resolution >> layers < 3:
            max_layers = max(1, (resolution // 3).bit_length() - 1)
            raise UserError(
                f"data.resolution={resolution} is too small for a discriminator with adversarial.layers={layers}. "
                f"Use adversarial.layers={max_layers} or fewer."
            )

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """Return the generator's unweighted adversarial loss, without gradients for the discriminator's weights."""
        self.discriminator.requires_grad_(False)
        loss = generator_loss(self.gan_loss, self.discriminator(reconstruction))
        self.discriminator.requires_grad_(True)
        return loss

    def accumulate_gradients(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Accumulate gradients scaled by `loss_scale`. Return the loss and accuracy of the discriminator."""
        real, fake = self.discriminator(torch.cat([images, reconstruction.detach().to(images.dtype)])).chunk(2)
        loss = discriminator_loss(self.gan_loss, real, fake)
        with torch.autocast(images.device.type, enabled=False):
            (loss * self.loss_scale).backward()
        accuracy = ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
        return {"discriminator": loss.detach(), "discriminator_accuracy": accuracy}

    def step(self, decay: float, guard: Guard | None = None) -> None:
        """Average the accumulated gradients over ranks and take a step with the learning rate lr * decay.

        The guard skips this step if the autoencoder's step was skipped or the discriminator's gradients are not finite.
        """
        if dist.is_available() and dist.is_initialized():
            for parameter in self.discriminator.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(dist.get_world_size())
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * decay
        if guard is not None:
            guard.check_second_optimizer(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def move_to(self, device: torch.device) -> None:
        """Move the discriminator and its optimizer to the device, and broadcast the weights from rank 0."""
        self.discriminator.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves the moments too
        if dist.is_available() and dist.is_initialized():
            for parameter in self.discriminator.parameters():
                dist.broadcast(parameter.data, src=0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "begun_at": self.start_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.start_step = state["begun_at"]
