"""What those who watch see: metrics, pages, probes, diagnosis, the canary."""
