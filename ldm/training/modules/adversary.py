"""The discriminator's side of stage 1: its weights, its optimizer, when it begins, and how hard it pulls.

It stands outside of the LightningModule on purpose. Lightning counts every optimizer's steps, and DDP waits for every
parameter's gradient: so the trainer knows the generator alone, `max_steps` are generator steps, and this side steps
once after each of them, with its gradients averaged over ranks here.
"""

from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from ldm.autoencoder.discriminator import GameType, PatchDiscriminator, discriminator_loss, generator_loss
from ldm.errors import InputError, UserError
from ldm.rules import Depth, NonNegative, Size, Whole, checked
from ldm.training.callbacks.guard import Guard


class Adversary:
    """A patch discriminator with its own Adam.

    Args:
        loss: hinge or non_saturating.
        weight: Of the adversarial loss, times lambda and the ramp.
        start: The generator step at which the discriminator begins to learn; below 1, a share of the budget.
        ramp: Generator steps over which the weight grows from 0: the discriminator learns before it is listened to.
        lr: Its peak learning rate; it decays as the generator's does.
        max_weight: The most that lambda may be.

    Raises:
        InputError: a number out of its range.
    """

    @checked
    def __init__(
        self,
        loss: Annotated[GameType, Field()] = "hinge",
        *,
        weight: NonNegative = 0.1,
        start: NonNegative = 0.5,
        ramp: Annotated[Whole, Field(ge=0)] = 200,
        lr: NonNegative = 5e-4,
        max_weight: NonNegative = 1e4,
        channels: Size = 32,
        layers: Annotated[Depth, Field(le=64)] = 3,
    ) -> None:
        if start >= 1 and start != int(start):
            raise InputError("start", start, "must be a whole step, or below 1 a share of the budget")
        self.shape = [channels, layers]
        self.game, self.weight, self.start, self.ramp, self.lr = loss, weight, start, ramp, lr
        self.max_weight = max_weight
        self.discriminator: nn.Module = PatchDiscriminator(channels, layers)
        # fused: it heeds found_inf, and so leaves a step out without a wait
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
        self.begun_at: int | None = None
        self.share = 1.0
        """A batch's part of a step: one over the batches that are accumulated."""
        self.balance: Any = None
        """Looks at the gradients of the autoencoder's last layer, once there is one."""

    def check(self, resolution: int) -> None:
        """Refuse images that are too small.

        Raises:
            UserError: with the layers that fit.
        """
        layers = self.shape[1]
        if resolution >> layers < 3:
            fitting = max(1, (resolution // 3).bit_length() - 1)
            raise UserError(
                f"The discriminator's adversarial.layers={layers} leave no patch of data.resolution={resolution}: "
                f"choose adversarial.layers={fitting}."
            )

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """The adversarial term, before its weight. Its gradient leaves the discriminator's weights alone."""
        self.discriminator.requires_grad_(False)
        loss = generator_loss(self.game, self.discriminator(reconstruction))
        self.discriminator.requires_grad_(True)
        return loss

    def learn(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Add the discriminator's gradients of a batch, `share` of a step."""
        real, false = self.discriminator(torch.cat([images, reconstruction.detach().to(images.dtype)])).chunk(2)
        loss = discriminator_loss(self.game, real, false)
        with torch.autocast(images.device.type, enabled=False):
            (loss * self.share).backward()
        right = ((real > 0).float().mean() + (false <= 0).float().mean()) / 2
        return {"discriminator": loss.detach(), "discriminator_accuracy": right}

    def step(self, decay: float, guard: Guard | None = None) -> None:
        """One step on the gathered gradients, averaged over ranks, at the learning rate lr * decay.

        A guard leaves it out with the autoencoder's, and where these gradients are not finite.
        """
        if dist.is_available() and dist.is_initialized():
            for parameter in self.discriminator.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(dist.get_world_size())
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * decay
        if guard is not None:
            guard.judge_beside(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def join(self, device: torch.device) -> None:
        """Move to this rank's device, with the weights of the first rank."""
        self.discriminator.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # its moments follow the weights
        if dist.is_available() and dist.is_initialized():
            for parameter in self.discriminator.parameters():
                dist.broadcast(parameter.data, src=0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "begun_at": self.begun_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.begun_at = state["begun_at"]
