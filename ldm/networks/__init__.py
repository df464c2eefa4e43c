"""Networks (z_t, t, condition) -> output, and the conditions they take."""
