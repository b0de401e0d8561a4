"""Several trainings side by side, one table."""
