"""The plan of a run before it starts: memory and time, estimated from options and shapes; docs/planning.md explains the formulas."""
