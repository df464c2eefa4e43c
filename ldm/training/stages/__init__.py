"""What differs between the stages."""
