"""What a user may say at start-up, and what is refused by name."""
