"""Proposes tokens, and decides how many of them pay."""
