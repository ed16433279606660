"""The TOML settings and qmail's control files."""
