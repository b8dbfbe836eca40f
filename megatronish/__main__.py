"""`python -m megatronish`."""

from megatronish.cli import main

if __name__ == "__main__":
    main()
