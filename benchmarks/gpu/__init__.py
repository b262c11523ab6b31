"""What `gpu_check.py` measures: a section a module, and what they share."""
