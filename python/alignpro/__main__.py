"""`python -m alignpro` is `alignpro`."""

from alignpro.cli import main

main()
