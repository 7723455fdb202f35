"""What a request may carry, and within what bounds."""
