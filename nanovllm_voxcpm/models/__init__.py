"""Names of nanovllm-voxcpm's models."""
