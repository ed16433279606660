"""Monitoring: metrics, pages, probes, diagnosis, the canary."""
