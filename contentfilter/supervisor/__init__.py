"""The supervisor process: keeps workers running and the configuration current."""
