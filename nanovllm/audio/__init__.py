"""Recordings in, speech out: files, resampling, containers, voices, and a model's text side."""
