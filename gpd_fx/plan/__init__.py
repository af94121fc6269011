"""Which channels widen, by how much, and why others do not."""
