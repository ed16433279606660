"""The TOML settings and qmail's control files."""

DEFAULT_PATH = "/etc/contentfilter/contentfilter.toml"
"""The one file that may be missing: the built-in defaults hold then."""
