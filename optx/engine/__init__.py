"""Decodes many requests at once over the caches that a model's specs ask for; names no technique and no model."""
