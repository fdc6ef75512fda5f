"""x[T, D] @ a packed weight [D, F]."""
