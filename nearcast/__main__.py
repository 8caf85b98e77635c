"""`python -m nearcast` is the console script."""

from nearcast.cli import main

if __name__ == "__main__":
    main(prog_name="nearcast")
