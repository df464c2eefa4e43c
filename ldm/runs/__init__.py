"""A run folder: opening, checkpoints, resuming, replacing, locks, provenance and lineage."""
