"""Being operated: systemd, log lines."""
