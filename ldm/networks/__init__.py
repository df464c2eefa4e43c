"""Networks that map (z_t, t, condition) to an output, and the conditions that they accept."""
