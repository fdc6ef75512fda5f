"""Recipes that ship with optx, as YAML."""
