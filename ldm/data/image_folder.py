"""The earlier place of `ldm.data.sources.image_folder`, for scripts that import it from here."""

from ldm.data.sources.image_folder import ImageFolder

__all__ = ["ImageFolder"]
