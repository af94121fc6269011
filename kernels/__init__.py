"""The library's heavy operations, each one function over plain tensors: a torch reference that a kernel can replace."""
