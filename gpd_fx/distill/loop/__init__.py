"""The loop: one update, evaluation, and what both need."""
