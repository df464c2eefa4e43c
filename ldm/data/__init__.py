"""Images in: sources, preparation, the cache of prepared images, the order of training."""
