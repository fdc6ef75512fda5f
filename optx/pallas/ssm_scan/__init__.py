"""Selective state-space scan: chunked prefill and one-step decode."""
