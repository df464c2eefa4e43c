"""File handling: atomic writes, locks, checksummed arrays, reads with a retry, and validation of untrusted files."""
