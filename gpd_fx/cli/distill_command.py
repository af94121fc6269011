"""`gpd-fx distill`: options become the values of a configuration, and a run is begun or taken up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpd_fx.distill.config import DistillConfig, load_config, read_values
from gpd_fx.distill.losses.weights import parse_weight
from gpd_fx.distill.run import Results, distill
from gpd_fx.errors import ArgumentError
from gpd_fx.io.extras import need


def run_command(
    out: Path,
    config: Path | None,
    resume: bool,
    given: Mapping[str, Any],
    settings: Sequence[str],
    weights: Sequence[str],
) -> Results:
    """Begin a run in the folder `out`, or take up the one there.

    Args:
        out: the folder of the run.
        config: a YAML file whose values the options go over.
        resume: take up the run in `out`, with the values in its config.yaml.
        given: values by name; None is not given.
        settings: NAME=VALUE for any value of the configuration.
        weights: LOSS=WEIGHT.

    Raises:
        ArgumentError: an option cannot be used.
    """
    for module in ("accelerate", "timm", "yaml"):
        need(module, "`gpd-fx distill`")
    values = {name: value for name, value in given.items() if value is not None}
    values |= dict(_setting(text) for text in settings)
    if weights:
        values["weights"] = {**values.get("weights", {}), **dict(_weight(text) for text in weights)}
    if resume:
        if values or config is not None:
            odd = ", ".join(sorted(values)) or "a configuration"
            raise ArgumentError(
                f"--resume takes up the run in {str(out)!r} with the values in its config.yaml; leave {odd} out, or "
                "change that file"
            )
        if not (out / "config.yaml").exists():
            raise ArgumentError(f"{str(out)!r} holds no run to take up: there is no config.yaml in it")
        return distill(load_config(out / "config.yaml"), out, resume=True)
    base = {} if config is None else read_values(config)
    if isinstance(base.get("weights"), Mapping) and "weights" in values:
        values["weights"] = {**base["weights"], **values["weights"]}
    return distill(DistillConfig.from_dict({**base, **values}), out)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ArgumentError(f"--set {text!r} must be NAME=VALUE, such as clip_grad=5")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def _weight(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ArgumentError(f"--weight {text!r} must be LOSS=WEIGHT, such as distill=3 or distill=0:0,10:3")
    return name.strip(), parse_weight(value)
