"""The rooms that touch a device: memory, transfers, slots."""
