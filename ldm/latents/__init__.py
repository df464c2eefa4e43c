"""Data passed between the stages: cached latents with their contract and statistics, and caption embeddings."""
