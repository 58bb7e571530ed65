"""Models in and out: what a MODEL word means, loading without running foreign code, atomic writing."""
