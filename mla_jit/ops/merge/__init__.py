"""Merge: two partial attention states, each an output and its LSE, become that of all their keys."""
