"""The normalised graph: one vocabulary of operators for both engines."""
