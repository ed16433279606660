"""contentfilter: a content filter that takes the place of qmail-queue."""

__version__ = "0.1.0"
