"""`python -m bench compose` and `python -m bench step`: speed of the composition, and of a training step."""

from __future__ import annotations

import typer

from bench import compose, step

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.command("compose")(compose.main)
app.command("step")(step.main)


if __name__ == "__main__":
    app()
