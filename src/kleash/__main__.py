"""`python -m kleash` is `kleash`."""

from kleash.cli import main

main()
