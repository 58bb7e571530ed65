"""What recalibration is on any engine: what sites saw, which statistics follow from it, and what is reported."""
