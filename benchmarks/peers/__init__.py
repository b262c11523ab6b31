"""The peer engines of `cpu_peers.py`: how each is installed, tuned and driven."""
