"""Attention over MLA latents: keys and values are one row of R + Hr numbers a token, shared by all heads."""
