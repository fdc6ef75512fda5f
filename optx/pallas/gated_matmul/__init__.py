"""`gated_act` and the product that reads its result."""
