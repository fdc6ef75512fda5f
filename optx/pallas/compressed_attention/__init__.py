"""Attention over compressed tokens, one for several cached ones, and its weights by compressed token."""
