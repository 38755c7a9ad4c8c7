"""`python -m bilevel_fast` is `bilevel-fast`."""

from bilevel_fast.cli import main

if __name__ == "__main__":
    main()
