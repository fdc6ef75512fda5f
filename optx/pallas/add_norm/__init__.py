"""The sum of a residual stream and what a layer's part adds to it, and the RMSNorm that the next part reads."""
