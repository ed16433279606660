"""What is kept: quarantine, journal, overrides, isolated messages."""
