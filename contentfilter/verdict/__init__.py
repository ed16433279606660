"""What goes back: reply text, headers, quarantine."""
