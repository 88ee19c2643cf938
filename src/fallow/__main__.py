"""`python -m fallow` is the `fallow` command."""

from fallow.cli import main

if __name__ == "__main__":
    main()
