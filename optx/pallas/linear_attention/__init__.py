"""Linear attention with decay: chunked prefill and one-step decode."""
