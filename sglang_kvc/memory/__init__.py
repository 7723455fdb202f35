"""The arena, what lives beside it on the device, and what all of it costs."""
