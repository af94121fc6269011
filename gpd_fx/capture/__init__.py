"""A module becomes graphs of ATen ops."""
