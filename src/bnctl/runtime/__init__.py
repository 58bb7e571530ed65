"""Running a model, whatever it is, on a batch."""
