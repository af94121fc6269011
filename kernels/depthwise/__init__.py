"""A depthwise conv and the batch norm behind it as one op."""
