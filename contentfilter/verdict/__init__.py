"""Results of the decision: disposition, reply text, header fields, log record."""
