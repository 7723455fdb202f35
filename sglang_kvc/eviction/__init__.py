"""One pass: score, select, pack."""
