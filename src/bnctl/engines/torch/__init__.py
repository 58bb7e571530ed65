"""The torch engine: capture by execution, surgery on the user's own modules."""
