"""Gated delta rule: chunked prefill and one-step decode."""
