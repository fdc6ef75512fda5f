"""The blocks of the highest scores, in order."""
