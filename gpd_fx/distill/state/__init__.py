"""What a run needs to go on: snapshots and checkpoints."""
