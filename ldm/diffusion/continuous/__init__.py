"""The chain in continuous time: SDE, probability-flow ODE and its likelihood."""
