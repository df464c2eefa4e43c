"""Files: atomic writes, locks, arrays, retrying reads, files from strangers."""
