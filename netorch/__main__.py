"""`python -m netorch`."""

from netorch.cli import main

main()
