"""Files that are whole or absent, optional packages, and models by name."""
