import typer
adapters = typer.Typer()
