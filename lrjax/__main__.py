"""``python -m lrjax``: the command."""

from lrjax.app.cli import main

if __name__ == "__main__":
    main()
