"""Does it help? Students on CIFAR-10, trained alone and with Gap Preserving Distillation; `python -m bench.cifar`."""
