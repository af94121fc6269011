"""Tools for FX graphs and for torch, which know nothing of widening."""
