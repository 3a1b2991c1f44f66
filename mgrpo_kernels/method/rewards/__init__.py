"""The rewards of methods that need more than a line: a module for each family."""
