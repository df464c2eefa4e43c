"""Stage 1's training: an autoencoder on images, with a discriminator beside it where one is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.discriminator import Balance, LastLayer
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.regularisers import Regulariser
from ldm.image_grid import rows, to_pil
from ldm.metrics.codes import codebook
from ldm.metrics.image import psnr, ssim
from ldm.runtime.random import Draws, torch_generator
from ldm.training.callbacks.loggers import save_grid
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.base import TrainingModule
from ldm.training.optim.factory import OptimizerFactory

NUM_SHOWN = 8
AFTER_STEP = 2**32
"""Sets the draws after a step apart from those of its rows, which have their block in this place."""


class VAETraining(TrainingModule):
    """Trains an autoencoder on images [b, 3, H, W] in [-1, 1].

    Args:
        model: Called as diffusers' AutoencoderKL or VQModel is.
        loss: Terms by name from images, reconstruction and what the regulariser says.
        regulariser: Takes a batch through the model.
        optimizer: Builds the optimizer.
        seed: Noise and flips of row i of step k depend on seed, k and i alone.
        flip: Mirror half of the images.
        adversary: The discriminator and its optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: AutoencoderLoss,
        regulariser: Regulariser,
        optimizer: OptimizerFactory,
        *,
        seed: int,
        flip: bool,
        pictures: Path,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__(model, optimizer, seed)
        self.loss, self.regulariser, self.flip, self.pictures = loss, regulariser, flip, pictures
        self.adversary, self.playing = adversary, False
        if adversary is not None:
            adversary.balance = Balance(LastLayer(model), adversary.max_weight)
        self._used_codes: Tensor | None = None

    def losses(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """`loss` is without the adversarial term, so that its curve has no jump; its gradient has it."""
        if self.flip:
            mirrored = draws.rand((len(images), 1, 1, 1)) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        if self.adversary is not None:
            self.adversary.balance.last_layer.keeping = self.playing
        made = self.regulariser.reconstruct(self.trained, images, draws.randn)
        if self.adversary is None or not self.playing:
            return self.loss(images, made.images, made.terms)
        reconstruction, judged = self.adversary.balance.split(made.images)
        terms = self.loss(images, reconstruction, made.terms)
        adversarial = self.adversary.generator_loss(judged)
        terms |= {"adversarial": adversarial, "loss": terms["loss"] + adversarial - adversarial.detach()}
        return terms | self.adversary.learn(images, made.images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.trained, self.loss)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.regulariser.forget()
        if self.adversary is not None:
            self.adversary.join(self.device)
            self.adversary.share = self.adversary.balance.share = 1 / self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        adversary, step = self.adversary, self.trainer.global_step
        if adversary is None or batch_idx % self.trainer.accumulate_grad_batches:
            return
        if adversary.begun_at is None:
            begins = (self.progress(step) if adversary.start < 1 else step) >= adversary.start
            if self.trainer.strategy.reduce_boolean_decision(begins, all=False):
                adversary.begun_at = step
        self.playing = adversary.begun_at is not None
        if adversary.begun_at is not None:
            adversary.balance.weight = None  # lambda is measured anew
            adversary.balance.factor = adversary.weight * min(1.0, (step - adversary.begun_at) / max(1, adversary.ramp))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.adversary is not None and self.playing and self.logs_now:
            balance = self.adversary.balance
            self.log_dict({"train/adaptive_weight": balance.weight, "train/adversarial_factor": balance.factor})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        generator = torch_generator(self.seed, self.data_step, AFTER_STEP, device=self.device)
        step = self.trainer.global_step
        left_out = None if self.guard is None else self.guard.skips
        self.regulariser.after_step(self.trained, generator, self.progress(step), left_out)
        if self.adversary is not None and self.playing:
            group = self.trainer.optimizers[0].param_groups[0]
            self.adversary.step(decay=group["lr"] / group.get("peak_lr", group["lr"]), guard=self.guard)

    def each_way(self, measure: Callable[[], float]) -> dict[bool, float]:
        found = super().each_way(measure)
        if self.adversary is not None:
            start = self.adversary.start
            self.share_alone = start if start < 1 else self.progress(int(start))
            self.adversary.join(self.device)
            self.playing = True
            found[True] = super().each_way(measure)[False]
            self.playing = False
            self.adversary.optimizer.zero_grad()
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adversary is not None:
            checkpoint["adversary"] = self.adversary.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adversary is not None:
            self.adversary.load_state_dict(checkpoint["adversary"])

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        made = self.regulariser.reconstruct(self.trained, images, None)
        reconstruction = made.images.float().clamp(-1, 1)
        terms = self.loss(images, reconstruction, made.terms)
        metrics = {f"val/{name}": value for name, value in terms.items()}
        metrics["val/psnr_db"] = psnr(images, reconstruction).mean()
        metrics["val/ssim"] = ssim(images, reconstruction).mean()
        self.log_dict(metrics, batch_size=len(images), sync_dist=True)
        if made.codes is not None:
            counts = torch.bincount(made.codes, minlength=self.regulariser.codebook_size or 0)
            self._used_codes = counts if batch_idx == 0 or self._used_codes is None else self._used_codes + counts
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._show(images[:NUM_SHOWN], reconstruction[:NUM_SHOWN])

    def on_validation_epoch_end(self) -> None:
        if self._used_codes is not None:
            counts = self.trainer.strategy.reduce(self._used_codes, reduce_op="sum")
            found = codebook(counts)
            for name in ("codebook_usage", "codebook_perplexity"):
                self.log(f"val/{name}", found[name], sync_dist=True)

    def _show(self, images: Tensor, reconstruction: Tensor) -> None:
        originals, reconstructed = to_pil(images), to_pil(reconstruction)
        picture = rows([("original", originals), ("reconstruction", reconstructed)])
        pairs = [image for pair in zip(originals, reconstructed, strict=True) for image in pair]
        captions = [f"{kind} {i}" for i in range(len(originals)) for kind in ("original", "reconstruction")]
        save_grid(self, self.pictures, "reconstructions", picture, pairs, captions)
