"""What is recorded and shown of a run."""
