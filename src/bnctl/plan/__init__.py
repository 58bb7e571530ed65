"""Pure reasoning on the normalised graph: what can be folded, where normalisation may go, and why not."""
