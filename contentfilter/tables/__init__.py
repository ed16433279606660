"""Sources of recipient rows, and the snapshot that the workers map."""
