"""Source distributions: where a flow starts."""
