"""The scheduling half of the engine: sequences, KV blocks, steps. No torch here."""
