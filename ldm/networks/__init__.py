"""(z_t, t, condition) -> output."""
