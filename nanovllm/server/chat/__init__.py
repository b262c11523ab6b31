"""Conversations, whatever the dialect they come in."""
