"""The output of a run: metrics, the collapse guard, the live view, the report and loggers."""
