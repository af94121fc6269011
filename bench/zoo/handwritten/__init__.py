"""Small models of our own with what zoo models lack; together they call nearly every op that has a rule."""

from __future__ import annotations

from bench.zoo.entry import Entry
from bench.zoo.handwritten import convs

MODELS: dict[str, Entry] = {f"own:{name}": entry for models in (convs.MODELS,) for name, entry in models.items()}
