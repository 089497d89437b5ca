"""`python -m favae` is the command `favae`."""

from favae.cli import main

if __name__ == "__main__":
    main()
