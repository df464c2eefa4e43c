"""Image data: sources, preparation, the cache of prepared images, and the training order."""
