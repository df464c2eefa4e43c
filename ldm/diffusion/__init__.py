"""The diffusion Markov chain: pure maths on tensors, independent of networks, data and trainers."""
