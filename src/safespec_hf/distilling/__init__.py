"""The target's own answers -> its hidden states -> a draft head."""
