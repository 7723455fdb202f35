"""Eviction passes: score, select, pack."""
