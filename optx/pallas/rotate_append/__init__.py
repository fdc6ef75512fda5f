"""Norms and rotary embedding of new queries and keys, and the append of keys and values to their pages."""
