"""The prompts: files and data sets, the task made of them, and the built-in demonstration's."""
