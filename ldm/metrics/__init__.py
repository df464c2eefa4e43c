"""Image and feature metrics, feature networks, and reports."""
