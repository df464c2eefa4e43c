"""The diffusion Markov chain: pure maths on tensors, ignorant of networks, data and trainers."""
