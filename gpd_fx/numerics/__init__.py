"""How far results are apart, and graphs made deterministic in a chosen precision."""
