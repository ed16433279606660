"""Processes: supervisor, workers, and the bus between them."""
