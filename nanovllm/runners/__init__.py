"""The layer that touches a device: memory, transfers, slots."""
