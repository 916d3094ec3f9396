"""``python -m sqa`` is the command ``sqa``."""

from sqa.cli import main

if __name__ == "__main__":
    main()
