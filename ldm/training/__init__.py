"""Both stages as Lightning trains them."""
