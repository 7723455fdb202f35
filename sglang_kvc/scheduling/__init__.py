"""Decisions of the host: who may run, when a pass is due, who gets pages back."""
