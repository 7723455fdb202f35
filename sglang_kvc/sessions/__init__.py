"""What compressed requests leave for the next turn of their conversation."""
