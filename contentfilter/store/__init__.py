"""Storage: quarantine, journal, overrides, release tokens, copies of isolated messages."""
