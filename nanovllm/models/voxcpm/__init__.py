"""VoxCPM (0.5B, 1.5 and 2): speech without discrete audio tokens."""
