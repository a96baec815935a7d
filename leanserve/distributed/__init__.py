"""Ranks and what they say to each other: collectives on tensors, the reducer of states, the step channel."""
