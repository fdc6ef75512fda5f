"""Ops and their kernels: a folder an op, `reference.py` defines it, `dispatch.py` lists who implements it."""
