"""The command line: text becomes calls."""
