"""``python -m contentfilter`` is the command line."""

from contentfilter.cli.main import main

if __name__ == "__main__":
    main()
