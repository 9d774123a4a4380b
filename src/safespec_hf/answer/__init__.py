"""One answer: its tokens and their risks, and what of it can be undone."""
