"""The plan of a run: estimates of its memory and time from options and shapes. docs/planning.md explains the formulas."""
