"""Something to try it on: the default target, its head and its draft."""
