"""Small models of our own with what zoo models lack; together they call nearly every op that has a rule."""

from __future__ import annotations

from bench.zoo.entry import Entry
from bench.zoo.handwritten import attention, convs, misc, norms, recurrent, shapes

_FILES = (convs.MODELS, attention.MODELS, norms.MODELS, shapes.MODELS, recurrent.MODELS, misc.MODELS)

MODELS: dict[str, Entry] = {f"own:{name}": entry for models in _FILES for name, entry in models.items()}
