"""`python -m cli` is `silotune`."""

from cli import main

if __name__ == "__main__":
    main()
