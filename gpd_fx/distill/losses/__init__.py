"""The objective, its weights, and what a static teacher gives."""
