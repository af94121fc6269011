"""The algebra of axes: expressions over atoms, their solver, and the copies of widened atoms."""
