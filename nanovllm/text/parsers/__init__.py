"""Parsers of what models write: thoughts, text and calls, told apart as they come."""
