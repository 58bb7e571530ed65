"""Accuracy and latency of several models side by side, and gates on them."""
