"""A trained latent diffusion model as a pipeline of diffusers, which needs only torch, diffusers and transformers.

    DiffusionPipeline.from_pretrained("runs/diffusion/demo/pipeline", trust_remote_code=True)

`save_pretrained` copies this module and the modules of the components into the folder, with what they import from this
package. diffusers runs these copies; `ldm` itself recognises its classes by name and never runs code from a folder. The
copies have a digest of their content in their names, because diffusers keeps all local code in a single cache.

Any output of the network is converted to a prediction of z_0, which every scheduler accepts (prediction_type "sample").
The chain is shortened to the visited steps, a chain of its own with as many steps: stock schedulers then visit the
same steps as the samplers in `ldm.diffusion`, also if their number does not divide T, or if alpha_bar is 0 at T.
"""

import hashlib
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.diffusion.portable import output_to_z_0, trailing_steps
from ldm.networks.text_embedding import embed_captions, load_text_encoder

PACKAGE = "ldm"
IMPORT = re.compile(rf"^from ({PACKAGE}\.[\w.]+) import (?:\([^)]*\)|.*)$", re.MULTILINE)
ALPHA_BAR_FLOOR = 1e-20
MIN_ALPHA_BAR_FOR_EULER = 1e-8
"""The Euler scheduler divides latents by sqrt(alpha_bar). If this is smaller, rounding errors exceed the signal."""
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""diffusers' schedulers that accept predictions of z_0."""
OTHER_SIGMAS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "flow_sigmas", "lu_lambdas")
"""Options use_<name> of schedulers that choose steps between those of the chain."""
SCHEDULER_OPTIONS = {
    "prediction_type": "sample",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "clip_sample": False,
    "rescale_betas_zero_snr": False,
}


class LatentDiffusionPipeline(DiffusionPipeline):
    """Generates images from noise with a trained network, a scheduler and an autoencoder.

    >>> from ldm import Run
    >>> pipeline = Run.open("runs/diffusion/demo").pipeline().to_diffusers()
    >>> images = pipeline(class_labels=["cat", "dog"], num_inference_steps=5).images
    >>> images[0].size
    (8, 8)

    Args:
        network: (z_t, timestep, **condition) -> output.
        vae: Autoencoder, whose decoder decodes samples.
        scheduler: One of diffusers' schedulers in SCHEDULERS.
        text_encoder: Text encoder of transformers, if the model is text-conditional.
        tokenizer: Its tokenizer.
        settings: What the weights do not say: prediction, variance, schedule, conditioning, latent_shape, latent_mean,
            latent_std and factor.
    """

    model_cpu_offload_seq = "text_encoder->network->vae"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        network: Any,
        vae: Any,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        settings: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            network=network, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(settings=settings)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Generate images.

        Args:
            prompt: Caption or captions, for a text-conditional model.
            class_labels: Class or classes, by number or name, for a class-conditional model.
            num_inference_steps: Number of steps of the scheduler.
            guidance_scale: Scale of classifier-free guidance; 1 disables it.
            negative_prompt: Caption to guide away from, instead of the empty caption; one for all or one per prompt.
            generator: A generator for the whole batch, or one per image, which makes images independent of the batch.
            height: Height in pixels. Other values than in training are possible, but images are worse.
            width: Width in pixels.
            latents: The noise z_T, [b, C, h, w], instead of drawing it.
            eta: Amount of noise of DDIM, from 0 to 1.
            output_type: "pil", "np" [b, H, W, 3] or "pt" [b, 3, H, W] in [0, 1], or "latent" for the standardised z_0.
            callback_on_step_end: Called as f(pipeline, i, t, tensors) after step i from t; can return other tensors.
            callback_on_step_end_tensor_inputs: Names of these tensors; only "latents".

        Returns:
            An ImagePipelineOutput, or a tuple if return_dict is False.

        Raises:
            ValueError: An argument does not fit this model. The message says what does.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent; got {output_type!r}.")
        settings, device = self.config.settings, self._execution_device
        condition, null, batch = self._conditions(prompt, class_labels, negative_prompt, num_images_per_prompt)
        guides = guidance_scale != 1 and bool(condition)
        inputs = {
            name: (torch.cat([value, null[name]]) if guides else value).to(device) for name, value in condition.items()
        }
        table = torch.tensor(settings["schedule"]["alpha_bar"], dtype=torch.float64)
        scheduler, visited = self._scheduler_for(table, num_inference_steps, device)
        accepted = inspect.signature(scheduler.step).parameters
        extra = {k: v for k, v in {"generator": generator, "eta": eta}.items() if k in accepted}
        noise = self._noise(latents, (batch, *self._latent_shape(height, width)), generator, device)
        # the network's first input is the noise itself, also if the scheduler has latents of another scale
        z = noise / scheduler.scale_model_input(torch.ones_like(noise), scheduler.timesteps[0])
        for i, (t, step) in enumerate(self.progress_bar(list(zip(visited, scheduler.timesteps, strict=True)))):
            z_t = scheduler.scale_model_input(z, step)
            doubled = torch.cat([z_t, z_t]) if guides else z_t
            timestep = torch.full((len(doubled),), t - 1, device=device)
            output = self.network(doubled.to(self.network.dtype), timestep, **inputs).float()
            learned = None
            if settings["variance"] == "learned_range":
                output, learned = output.chunk(2, dim=1)
            z_0 = output_to_z_0(output, doubled, table[t], settings["prediction"])
            if guides:
                z_0, z_0_null = z_0.chunk(2)
                z_0 = z_0_null + guidance_scale * (z_0 - z_0_null)
            if learned is not None and isinstance(scheduler, DDPMScheduler):
                z_0 = torch.cat([z_0, learned[:batch]], dim=1)
            z = scheduler.step(z_0, step, z, **extra, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {"latents": z} if "latents" in callback_on_step_end_tensor_inputs else {}
                z = (callback_on_step_end(self, i, t - 1, tensors) or {}).get("latents", z)
        images = z if output_type == "latent" else self._decode(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditions(
        self, prompt: Any, class_labels: Any, negative_prompt: Any, num_images: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Return the condition of each image, the condition that guidance leads away from, and the batch size."""
        conditioning = self.config.settings["conditioning"]
        kind = conditioning["kind"]
        for name, value, needed in (
            ("prompt", prompt, "text"),
            ("negative_prompt", negative_prompt, "text"),
            ("class_labels", class_labels, "class"),
        ):
            if value is not None and kind != needed:
                other = {"text": "prompt", "class": "class_labels"}.get(kind)
                raise ValueError(f"This model takes no {name}. {f'Use {other}' if other else 'It is unconditional'}.")
        if kind == "none":
            return {}, {}, num_images
        if kind == "class":
            given = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
            labels = torch.tensor([self._label(x) for x in given for _ in range(num_images)])
            null = torch.full_like(labels, len(conditioning["class_names"]))
            return {"label": labels}, {"label": null}, len(labels)
        captions = [prompt or ""] if isinstance(prompt, str | None) else list(prompt)
        negative = [negative_prompt or ""] if isinstance(negative_prompt, str | None) else list(negative_prompt)
        negative = negative * len(captions) if len(negative) == 1 else negative
        if len(negative) != len(captions):
            raise ValueError(f"negative_prompt has {len(negative)} texts for {len(captions)} prompts. Give one each.")
        if self.text_encoder is None:
            self._download_text_encoder(conditioning["encoder"], conditioning.get("revision"))
        embedded = [
            embed_captions(
                self.tokenizer,
                self.text_encoder,
                [text for text in texts for _ in range(num_images)],
                conditioning["max_tokens"],
                conditioning.get("masked", True),
            )
            for texts in (captions, negative)
        ]
        return embedded[0], embedded[1], len(captions) * num_images

    def _download_text_encoder(self, name: str, revision: str | None) -> None:
        """Load the text encoder from the Hub, for a folder that only names it."""
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        self.text_encoder = load_text_encoder(name, revision=revision).to(self.network.device)

    def _label(self, label: int | str | None) -> int:
        names = self.config.settings["conditioning"]["class_names"]
        if str(label) in names:
            return names.index(str(label))
        if str(label).isdigit() and int(str(label)) < len(names):
            return int(str(label))
        examples = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"class_labels: {label} is not a class of this model. It has {len(names)}: {examples}.")

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        settings = self.config.settings
        (channels, *trained), factor = settings["latent_shape"], settings["factor"]
        sizes = []
        for name, pixels, side in zip(("height", "width"), (height, width), trained, strict=True):
            if pixels is not None and (pixels <= 0 or pixels % factor):
                raise ValueError(
                    f"{name} must be a positive multiple of {factor}, such as {side * factor}; got {pixels}."
                )
            sizes.append(side if pixels is None else pixels // factor)
        if sizes != trained:
            size, used = (" x ".join(str(side * factor) for side in sides) for sides in (sizes, trained))
            warnings.warn(f"This model was trained on images of {used} pixels; {size} may look worse.", stacklevel=3)
        return channels, sizes[0], sizes[1]

    def _noise(self, latents: Tensor | None, shape: tuple[int, ...], generator: Any, device: Any) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator has {len(generator)} entries for {shape[0]} images. Give one each, or one.")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have the shape {list(shape)}; got {list(latents.shape)}.")
        return latents.to(device, torch.float32)

    def _scheduler_for(self, table: Tensor, num_steps: int, device: Any) -> tuple[Any, list[int]]:
        """Return the scheduler for the shortened chain, and the steps t of the full chain that it visits."""
        kind, config = type(self.scheduler), self.scheduler.config
        if kind.__name__ not in SCHEDULERS:
            raise ValueError(f"{kind.__name__} accepts no predictions of z_0. Use one of: {', '.join(SCHEDULERS)}.")
        if unsupported := [f"use_{name}" for name in OTHER_SIGMAS if config.get(f"use_{name}")]:
            raise ValueError(f"{unsupported[0]} chooses steps that the chain does not have. Set it to False.")
        if kind is EulerDiscreteScheduler and table[-1] < MIN_ALPHA_BAR_FOR_EULER:
            raise ValueError(f"{kind.__name__} cannot start from pure noise, where alpha_bar is 0. Use DDIMScheduler.")
        if not 1 <= num_steps <= len(table) - 1:
            raise ValueError(f"num_inference_steps must be between 1 and {len(table) - 1}; got {num_steps}.")
        visited = trailing_steps(len(table) - 1, num_steps)
        alpha_bar = table[visited].flip(0).clamp(min=ALPHA_BAR_FLOOR)
        options = {**SCHEDULER_OPTIONS, "num_train_timesteps": num_steps}
        options["trained_betas"] = (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()
        if kind is DDPMScheduler:
            options["variance_type"] = config.get("variance_type") or self.config.settings["variance"]
        known = inspect.signature(kind.__init__).parameters
        scheduler = kind.from_config(config, **{k: v for k, v in options.items() if k in known})
        scheduler.alphas_cumprod = alpha_bar[1:].float()
        scheduler.set_timesteps(num_steps, device=device)
        return scheduler, visited[:-1]

    def _decode(self, z: Tensor, output_type: str) -> Any:
        settings = self.config.settings
        mean, std = (torch.tensor(settings[f"latent_{name}"]).to(z)[:, None, None] for name in ("mean", "std"))
        images = self.vae.decode((z * std + mean).to(self.vae.dtype)).sample.float().clamp(-1, 1) / 2 + 0.5
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline and the code that it needs.

        Raises:
            ValueError: If push_to_hub is set.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub would upload the folder without its code. Save it, then upload the folder.")
        super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory, self.config_name)
        index = json.loads(file.read_text(encoding="utf-8"))
        for name, component in {"": self, **self.components}.items():
            module = type(component).__module__
            if component is None or module.split(".")[0] in ("diffusers", "transformers"):
                continue
            stem, source = portable_code(module)
            Path(save_directory, name, f"{stem}.py").write_text(source, encoding="utf-8")
            index[name or "_class_name"] = [stem, type(component).__name__]
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def portable_code(module: str) -> tuple[str, str]:
    """Return the name and the source of a module's copy, in which modules of this package replace their imports.

    It is a single file, because diffusers downloads no others from the Hub. The copy of a copy is identical.
    """
    source = Path(inspect.getfile(importlib.import_module(module))).read_text(encoding="utf-8")
    stem = module.rpartition(".")[2]
    if module.split(".")[0] == PACKAGE:
        source = IMPORT.sub(lambda match: portable_code(match[1])[1].rstrip(), source)
        stem = f"{PACKAGE}_{stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return stem, source
