"""``python -m contentfilter.worker``: started only by the supervisor."""

from contentfilter.worker.application import build
from contentfilter.worker.main import main

if __name__ == "__main__":
    main(build)
