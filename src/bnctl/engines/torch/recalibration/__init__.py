"""The parts of recalibration: intercepted operators, sites, activations' moments, schedules, and what is reported."""
