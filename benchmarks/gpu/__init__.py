"""What only an accelerator shows, measured in minutes: ``python -m benchmarks.gpu`` (``make gpu``)."""
