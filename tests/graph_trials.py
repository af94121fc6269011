"""Trials: a random program, and how it is widened. The number of a trial, with a seed, makes it again."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import gpd_fx
from gpd_fx.capture.capture import Mode
from tests.graph_check import Found, Setting, WrongError, check, draw_settings
from tests.graph_laws import check_laws, quiet
from tests.graphs import Program, RandomNet, draw_program, example

_TRAIN = 4  # one trial in so many is captured in train mode too
_LAWS = 25  # one trial in so many is taken through `expand` itself, gradients, a training step, fold and copies


@dataclass(frozen=True)
class Trial:
    """A model as data, and what is done with it."""

    program: Program
    settings: tuple[Setting, ...]
    modes: tuple[Mode, ...] = ("eval",)
    laws: bool = False

    def run(self) -> Found:
        """Check that widening changes nothing.

        Raises:
            CaptureError: torch.export cannot capture the model.
            WrongError: it changes something, or fails.
        """
        try:
            with quiet():
                model = RandomNet(self.program).eval()
                found = check(model, lambda batch: example(self.program, batch, batch), self.settings, self.modes)
        except (WrongError, gpd_fx.CaptureError):
            raise
        except Exception as error:
            raise WrongError("the model itself fails", f"{type(error).__name__}: {error}") from error
        if self.laws:
            try:
                check_laws(self.program, self.settings[0].ratio)
            except Exception as error:
                raise WrongError("a law is broken", f"{type(error).__name__}: {error}") from error
        return found


def draw_trial(seed: int, number: int) -> Trial:
    """The trial of a number, of those of a seed."""
    random = Random(f"{seed} {number}")
    program = draw_program(random)
    modes: tuple[Mode, ...] = ("eval", "train") if number % _TRAIN == 0 else ("eval",)
    return Trial(program, tuple(draw_settings(random)), modes, number % _LAWS == _LAWS - 1)
