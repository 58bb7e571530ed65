"""``python -m bnctl``."""

from bnctl.cli.app import main

if __name__ == "__main__":
    main()
