"""Speed, memory and sizes, each figure gated by a check: `python -m bench COMMAND --help`."""

from __future__ import annotations

import typer

from bench import compose, depthwise, everything, expand, folded, step, table, tune

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.command("compose")(compose.main)
app.command("depthwise")(depthwise.main)
app.command("step")(step.main)
app.command("onnx")(folded.main)
app.command("expand")(expand.main)
app.command("tune")(tune.main)
app.command("all")(everything.main)
app.command("table")(table.main)


if __name__ == "__main__":
    app()
