"""Memory on the device: the arena, what lives beside it, and what all of it costs."""
