"""indexed_attention: attention over the tokens that an index chose."""
