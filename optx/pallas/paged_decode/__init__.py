"""Attention of 1 to 8 new tokens a row over paged keys and values."""
