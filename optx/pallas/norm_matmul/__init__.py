"""`add_norm` and the product that alone reads its norm."""
