"""Messages and sockets inside the pool, and the event feed."""
