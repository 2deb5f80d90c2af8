"""`python -m kleash` is `kleash`."""

from kleash.cli.main import main

main()
