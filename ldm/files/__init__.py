"""File handling: atomic writes, locks, checksummed arrays, reads with a retry, and safe reading of untrusted files."""
