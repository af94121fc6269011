"""The version of gpd_fx."""

__version__ = "0.1.0"
