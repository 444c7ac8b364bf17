"""One folder a task: what it measures, on what data, and beside which references."""
