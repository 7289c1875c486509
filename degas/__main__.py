"""`python -m degas`, the same as the `degas` script."""

from degas.cli import main

if __name__ == "__main__":
    main()
