"""The HTTP server: a router a surface, and what protects them all."""
