"""Where recipient rows come from, and the snapshot that the workers map."""
