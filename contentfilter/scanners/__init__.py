"""Those who look at a message."""
