"""The earlier place of `ldm.data.sources.huggingface`, for scripts that import it from here."""

from ldm.data.sources.huggingface import HuggingFace

__all__ = ["HuggingFace"]
