"""Names of nanovllm-voxcpm for VoxCPM."""
