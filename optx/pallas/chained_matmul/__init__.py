"""Products of one token that read each other's results."""
