"""Stage 1 training: an autoencoder on images, optionally with a discriminator."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.discriminator import AdaptiveWeight, LastLayer
from ldm.autoencoder.losses import AutoencoderLoss
from ldm.autoencoder.regularisers import Regulariser
from ldm.autoencoder.sampling_decoder import decode_noisy, sampling_decoder_of
from ldm.image_grid import labelled_rows, to_pil
from ldm.metrics.codes import codebook_metrics
from ldm.metrics.image import psnr, ssim
from ldm.runtime.random import Draws, torch_generator
from ldm.training.callbacks.loggers import save_grid
from ldm.training.modules.adversary import Adversary
from ldm.training.modules.base import TrainingModule
from ldm.training.optim.factory import OptimizerFactory

NUM_GRID_IMAGES = 8
"""Number of validation images in the grid of reconstructions."""
AFTER_STEP_DRAWS = 2**32
"""Seed component for random draws made after a step. Row indices, which seed other draws, are smaller."""


class VAETraining(TrainingModule):
    """Trains an autoencoder on images [b, 3, H, W] in [-1, 1].

    With `decoder_noise`, the last part of the budget is a second phase, which trains the sampling decoder on the
    latents of the trained encoder. If both were trained together, it would have to follow latents that still change.

    Args:
        model: A model with the interface of diffusers' AutoencoderKL or VQModel.
        loss: Computes the loss terms by name from images, reconstructions and regularisation terms.
        regulariser: Regularises the latents and runs the model on a batch.
        optimizer: Builds the optimizer.
        seed: The random draws for row i in step k depend only on seed, k and i.
        flip: True to mirror each image with probability 1/2.
        figures_dir: Folder for the grids of reconstructions.
        adversary: The discriminator and its optimizer.
        decoder_noise: Scale of the noise levels used to train the model's sampling decoder; 0 to not train one.
        decoder_share: Fraction of the budget, at its end, spent on the sampling decoder.
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
        figures_dir: Path,
        adversary: Adversary | None = None,
        decoder_noise: float = 0.0,
        decoder_share: float = 0.7,
    ) -> None:
        super().__init__(model, optimizer, seed)
        self.loss, self.regulariser, self.flip, self.figures_dir = loss, regulariser, flip, figures_dir
        self.adversary, self.adversarial_on = adversary, False
        self.decoder_noise = decoder_noise
        self.second_phase_at = 1 - decoder_share if decoder_noise else 1.0
        if adversary is not None:
            adversary.adaptive_weight = AdaptiveWeight(LastLayer(model), adversary.max_weight)
        self._code_counts: Tensor | None = None

    def losses(self, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Return the loss terms of a batch by name.

        The value of `loss` excludes the terms of the adversary and the sampling decoder, so that it can be compared
        with val/loss and does not jump when the discriminator starts. The gradient of `loss` includes them.
        """
        if self.flip:
            mirrored = draws.rand((len(images), 1, 1, 1)) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        if self.adversary is not None:
            self.adversary.adaptive_weight.last_layer.records_input = self.adversarial_on
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.in_second_phase):
            output = self.regulariser.reconstruct(self.trained, images, draws.randn)
            reconstruction, fake = output.images, None
            if self.adversary is not None and self.adversarial_on:
                reconstruction, fake = self.adversary.adaptive_weight.split(output.images)
            terms = self.loss(images, reconstruction, output.terms)
        if self.in_second_phase:
            decoded = decode_noisy(self.trained.sampling_decoder, output.z_raw, self.decoder_noise, draws.randn)
            terms |= add_hidden_term(terms, "sampling_decoder", self.loss.sampling_distortion(images, decoded))
        elif self.adversary is not None and fake is not None:
            terms |= add_hidden_term(terms, "adversarial", self.adversary.generator_loss(fake))
            terms |= self.adversary.accumulate_gradients(images, output.images)
        if torch.distributed.is_initialized():  # DistributedDataParallel expects a gradient for each parameter
            terms["loss"] = terms["loss"] + 0 * sum(p.sum() for p in self.idle_parameters())
        return terms

    def idle_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters that the current phase does not train."""
        decoder = sampling_decoder_of(self.trained)
        own = set() if decoder is None else {id(parameter) for parameter in decoder.parameters()}
        parameters = itertools.chain(self.trained.parameters(), self.loss.parameters())
        return [p for p in parameters if p.requires_grad and (id(p) in own) != self.in_second_phase]

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        for parameter in self.idle_parameters():
            parameter.grad = None  # a gradient of zero would still move it, by its momentum
        super().configure_gradient_clipping(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.trained, self.loss)

    def start_second_phase(self) -> None:
        self.trained.sampling_decoder.restart_from(self.trained)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.regulariser.clear_batches()
        if self.adversary is not None:
            self.adversary.move_to(self.device)
            loss_scale = 1 / self.trainer.accumulate_grad_batches
            self.adversary.loss_scale = self.adversary.adaptive_weight.loss_scale = loss_scale

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        adversary, step = self.adversary, self.trainer.global_step
        if adversary is None or batch_idx % self.trainer.accumulate_grad_batches:
            return
        if adversary.start_step is None:
            is_due = (self.progress(step) if adversary.start < 1 else step) >= adversary.start
            if self.trainer.strategy.reduce_boolean_decision(is_due, all=False):
                adversary.start_step = step
        self.adversarial_on = adversary.start_step is not None and not self.in_second_phase
        if adversary.start_step is not None:
            ramp = min(1.0, (step - adversary.start_step) / max(1, adversary.ramp))
            adversary.adaptive_weight.weight = None  # compute a new lambda in this step
            adversary.adaptive_weight.factor = adversary.weight * ramp

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.adversary is not None and self.adversarial_on and self.logs_this_step:
            adaptive = self.adversary.adaptive_weight
            self.log_dict({"train/adaptive_weight": adaptive.weight, "train/adversarial_factor": adaptive.factor})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        generator = torch_generator(self.seed, self.data_step, AFTER_STEP_DRAWS, device=self.device)
        step = self.trainer.global_step
        skip = None if self.guard is None else self.guard.skip
        self.regulariser.after_step(self.trained, generator, self.progress(step), skip)
        if self.adversary is not None and self.adversarial_on:
            group = self.trainer.optimizers[0].param_groups[0]
            self.adversary.step(decay=group["lr"] / group.get("peak_lr", group["lr"]), guard=self.guard)

    def measure_each_mode(self, measure: Callable[[], float]) -> dict[bool, float]:
        results = super().measure_each_mode(measure)
        if self.adversary is not None:
            start = self.adversary.start
            self.fraction_without_adversary = start if start < 1 else self.progress(int(start))
            self.adversary.move_to(self.device)
            self.adversarial_on = True
            results[True] = super().measure_each_mode(measure)[False]
            self.adversarial_on = False
            self.adversary.optimizer.zero_grad()
        return results

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adversary is not None:
            checkpoint["adversary"] = self.adversary.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adversary is not None:
            self.adversary.load_state_dict(checkpoint["adversary"])

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        output = self.regulariser.reconstruct(self.trained, images, None)
        reconstruction = output.images.float().clamp(-1, 1)
        terms = self.loss(images, reconstruction, output.terms)
        metrics = {f"val/{name}": value for name, value in terms.items()}
        metrics["val/psnr_db"] = psnr(images, reconstruction).mean()
        metrics["val/ssim"] = ssim(images, reconstruction).mean()
        self.log_dict(metrics, batch_size=len(images), sync_dist=True)
        if output.codes is not None:
            counts = torch.bincount(output.codes, minlength=self.regulariser.codebook_size or 0)
            self._code_counts = counts if batch_idx == 0 or self._code_counts is None else self._code_counts + counts
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._save_reconstructions(images[:NUM_GRID_IMAGES], reconstruction[:NUM_GRID_IMAGES])

    def on_validation_epoch_end(self) -> None:
        if self._code_counts is not None:
            counts = self.trainer.strategy.reduce(self._code_counts, reduce_op="sum")
            metrics = codebook_metrics(counts)
            for name in ("codebook_usage", "codebook_perplexity"):
                self.log(f"val/{name}", metrics[name], sync_dist=True)

    def _save_reconstructions(self, images: Tensor, reconstruction: Tensor) -> None:
        originals, reconstructed = to_pil(images), to_pil(reconstruction)
        figure = labelled_rows([("original", originals), ("reconstruction", reconstructed)])
        pairs = [image for pair in zip(originals, reconstructed, strict=True) for image in pair]
        captions = [f"{kind} {i}" for i in range(len(originals)) for kind in ("original", "reconstruction")]
        save_grid(self, self.figures_dir, "reconstructions", figure, pairs, captions)


def add_hidden_term(terms: dict[str, Tensor], name: str, term: Tensor) -> dict[str, Tensor]:
    """Return a term by name, and a loss whose gradient includes the term, but whose value does not."""
    return {name: term, "loss": terms["loss"] + (term - term.detach())}
