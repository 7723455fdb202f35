"""What the host decides: who may run, when a pass is due, who gets pages back."""
