"""Bits per dimension through both stages."""
