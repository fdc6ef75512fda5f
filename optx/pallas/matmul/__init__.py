"""x[..., D] @ a dense weight [D, F]."""
