"""`python -m lmc.cli`: the `lmc` command."""

from lmc.cli import main

if __name__ == "__main__":
    main()
