"""`python -m moestro` is the `moestro` command."""

from moestro.cli import main

main()
