"""One-off tools for administrators: installing, diagnosing, migrating."""
