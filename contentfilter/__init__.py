"""contentfilter: the content filter that stands where qmail-queue stood."""

__version__ = "0.1.0"
