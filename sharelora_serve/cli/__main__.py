"""python -m sharelora_serve.cli is the console script sharelora-serve."""

from sharelora_serve.cli import main

main()
