"""Messages come in: the listening socket, descriptors, origin."""
