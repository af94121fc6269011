"""The composition of all layers' kernels: the operator, its plain reference and its Triton kernels."""
