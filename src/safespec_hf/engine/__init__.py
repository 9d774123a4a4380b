"""One fast forward over rows that grow at different speeds."""
