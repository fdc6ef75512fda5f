"""Selective scan with a state a channel: chunked prefill and one-step decode."""
