"""The networks, and how checkpoints become them."""
