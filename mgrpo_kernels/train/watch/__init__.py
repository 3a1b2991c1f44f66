"""What a run tells its user: metrics, the collapse guard, the live view, the report and loggers."""
