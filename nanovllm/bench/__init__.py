"""What `nanovllm bench` and `nanovllm doctor` measure and look up."""
