"""act(gate) * up of a gated MLP."""
