"""Attention over self-contained sequences on the GPU; the op is defined in `optx.pallas.attention.reference`."""
