"""One file per command: from arguments to a report."""
