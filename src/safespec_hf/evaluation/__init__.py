"""Whether guarded answers stop harm: judges of answers, and what is said of their verdicts."""
