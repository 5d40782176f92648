"""`python -m stillhouse`, and the `stillhouse` command."""

from stillhouse.cli import main

if __name__ == "__main__":
    main()
