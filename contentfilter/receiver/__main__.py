"""``python -m contentfilter.receiver``: started by the supervisor only."""

from contentfilter.receiver.main import main

if __name__ == "__main__":
    main()
