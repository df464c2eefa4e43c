"""What passes between the stages: latents under a contract, their statistics and captions."""
