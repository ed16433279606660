"""The worker process: accepts messages and handles them."""
