"""Where a message comes in: the listening socket, its peer, its descriptors."""
