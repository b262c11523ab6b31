"""An engine: how it is loaded, and how it runs in a process of its own."""
