"""Networks that map (z_t, t, condition) to an output, and their conditioning."""
