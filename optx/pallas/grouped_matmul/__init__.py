"""x[T, D], rows sorted by expert, @ weights [E, D, F]."""
