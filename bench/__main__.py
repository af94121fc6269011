"""`python -m bench compose` and `python -m bench step`: speed of the composition, and of a training step."""

from __future__ import annotations

import typer

from bench import compose

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.command("compose")(compose.main)


@app.callback()
def _() -> None:
    """Keep the command's name while there is only one."""


if __name__ == "__main__":
    app()
