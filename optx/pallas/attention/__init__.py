"""Attention over self-contained sequences (`flash_attention`) and over paged caches."""
