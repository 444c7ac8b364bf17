"""flowbench."""
