"""Run folders: opening, checkpoints, resuming, replacement, locking, provenance and lineage."""
