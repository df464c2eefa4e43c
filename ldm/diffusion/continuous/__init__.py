"""The chain in continuous time: the SDE, the probability-flow ODE, and the likelihood under the ODE."""
